"""Where images come from, how they are batched and shared out, and files that survive a kill."""

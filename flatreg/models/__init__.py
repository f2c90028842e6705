"""What timm lacks: the networks of the CIFAR literature, and weights that come by pip."""

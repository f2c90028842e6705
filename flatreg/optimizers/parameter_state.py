"""The parameters of an optimizer, and what the wrapper knows and remembers of each.

What lasts between steps lies in the base optimizer's own `state` and `param_groups`, so that every
way to save an optimizer finds it. The base optimizer never sees it: see `hidden_from`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from flatreg.data.text import one_line

Scope = nn.Module | Iterable[Tensor]
Layouts = list[tuple[Tensor, int, bool]]

# In each group; no base optimizer has them. The last two are those of `tail`.
RHO, STEPS, PEAK, SINCE = OURS = "sam_rho", "sam_steps", "sam_peak_lr", "sam_tail_since"
_MOMENTA = ("momentum_buffer", "exp_avg", "momentum")  # in torch, timm and others
_PREFIX = "flatreg_"  # of what rules remember, in the state of each parameter
_ASIDE = "sharpness_aware"  # beside a form that is not known


@dataclass
class ParameterState:
    """A parameter of the optimizer, and what the wrapper knows of it.

    Attributes:
        weight: the parameter.
        rho: radius of its group.
        in_scope: whether it is perturbed.
        groups: of a grouped convolution, each of which is a linear map of its own.
        transposed: a transposed convolution, whose first axis is its input.
        memory: what rules keep between steps, by name; of the type and shards of the weight, or
            0-d.
    """

    weight: Tensor
    rho: float = 0.0
    in_scope: bool = True
    groups: int = 1
    transposed: bool = False
    memory: MutableMapping[str, Tensor] = field(default_factory=dict)

    @property
    def momentum(self) -> Tensor | None:
        """The base optimizer's own running mean or sum of gradients, where it keeps one."""
        return self.memory.momentum if isinstance(self.memory, Memory) else None


States = Sequence[ParameterState]


class Memory(MutableMapping[str, Tensor]):
    """What rules remember of one parameter, in the state that the base optimizer has of it."""

    def __init__(self, base: Any, weight: Tensor) -> None:
        self._base, self._weight = base, weight

    def _all(self) -> Mapping[str, Tensor]:
        found: Mapping[str, Tensor] = self._base.state.get(self._weight, {})
        return found

    def __getitem__(self, name: str) -> Tensor:
        return self._all()[_PREFIX + name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self._base.state.setdefault(self._weight, {})[_PREFIX + name] = value
        if self._all().get(_PREFIX + name) is not value:
            raise RuntimeError(
                f"{type(self._base).__name__} makes its state anew whenever it is read, and has no "
                "place for what this method remembers: wrap each of its optimizers by itself"
            )

    def __delitem__(self, name: str) -> None:
        del self._base.state[self._weight][_PREFIX + name]

    def __iter__(self) -> Iterator[str]:
        return (k.removeprefix(_PREFIX) for k in self._all() if _is_ours(k))

    def __len__(self) -> int:
        return sum(map(_is_ours, self._all()))

    @property
    def momentum(self) -> Tensor | None:
        """See `ParameterState.momentum`."""
        found = [self._all().get(name) for name in _MOMENTA]
        whole = (v for v in found if isinstance(v, Tensor) and v.shape == self._weight.shape)
        return next(whole, None)


def check_radius(name: str, value: Any) -> None:
    """Refuse what is no radius.

    Raises:
        ValueError: it is no number, negative or not finite.
    """
    number = isinstance(value, Real | Tensor) and not isinstance(value, bool)  # True is no 1
    if not number or not 0 <= float(value) < float("inf"):
        raise ValueError(f"{name} must be >= 0 and finite, got {value!r}")


def complete_groups(base: Any, rho: float) -> None:
    """Give every group its radius, its count of steps and what `tail` needs, where it lacks them.

    Raises:
        ValueError: a group has `rho`, which is neither read here nor known to the base; a group
            maximizes; a radius is negative or infinite; the groups do not keep what is written to
            them.
    """
    first = {STEPS: 0, PEAK: 0.0, SINCE: -1} | base.param_groups[0]
    for group in base.param_groups:
        if "rho" in group and not knows_rho(base):
            raise ValueError(
                f"a group has rho={group['rho']}, which {type(base).__name__} does not know: write "
                "the radius of a group as 'sam_rho'"
            )
        if group.get("maximize"):
            raise ValueError(
                "a group has maximize=True, and a step that raises the loss has its worst case "
                "where the loss is lower: negate the loss, and delete maximize"
            )
        group.setdefault(RHO, rho)
        for name in (STEPS, PEAK, SINCE):
            group.setdefault(name, first[name])
        if not isinstance(group[RHO], Tensor):  # one on an accelerator is not waited for
            check_radius("sam_rho of a group", group[RHO])
    if any(RHO not in group for group in base.param_groups):
        raise ValueError(
            f"{type(base).__name__} makes its groups anew whenever they are read, and has no place "
            "for a radius: wrap each of its optimizers by itself"
        )


@contextmanager
def hidden_from(base: Any) -> Iterator[None]:
    """Take out of the base optimizer's state and groups what is not its own, then put it back.

    Many optimizers initialise the state of a parameter where it is empty, or iterate over it.
    """
    groups = [{k: group.pop(k) for k in OURS if k in group} for group in base.param_groups]
    memories: list[tuple[Tensor, dict[str, Any]]] = []
    for weight in _weights(base):
        state = base.state.get(weight, {})
        ours = {k: state.pop(k) for k in list(state) if _is_ours(k)}
        if ours:
            memories.append((weight, ours))
            if not state:
                del base.state[weight]
    try:
        yield
    finally:
        for group, kept in zip(base.param_groups, groups, strict=False):
            group.update(kept)
        for weight, ours in memories:
            base.state.setdefault(weight, {}).update(ours)


def with_ours(state_dict: dict[str, Any], base: Any) -> dict[str, Any]:
    """A checkpoint of the base optimizer with all that is not its own, where it lacks any.

    As of an optimizer around another, which has a state of its own and saves that of the other.
    """
    memories = [dict(Memory(base, weight)) for weight in _weights(base)]
    groups = [{k: group[k] for k in OURS} for group in base.param_groups]
    if not _is_standard(state_dict):
        own = {"groups": groups, "memory": {i: m for i, m in enumerate(memories) if m}}
        return {**state_dict, _ASIDE: own}
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    state = dict(state_dict["state"])
    for key, memory in zip(keys, memories, strict=True):
        ours = {_PREFIX + name: value for name, value in memory.items()}
        if ours.keys() - state.get(key, {}).keys():
            state[key] = {**state.get(key, {}), **ours}
    saved = zip(state_dict["param_groups"], groups, strict=True)
    return {**state_dict, "state": state, "param_groups": [{**own, **g} for g, own in saved]}


def without_ours(state_dict: Mapping[str, Any], base: Any) -> dict[str, Any]:
    """A checkpoint as the base optimizer alone would have written it."""
    plain = {k: v for k, v in state_dict.items() if k != _ASIDE}
    if not _is_standard(state_dict):
        return plain  # a wrapper around the optimizer that steps writes another form
    plain["param_groups"] = [
        {k: v for k, v in group.items() if k not in OURS} for group in state_dict["param_groups"]
    ]
    plain["state"] = {}
    for key, state in state_dict["state"].items():
        is_mapping = isinstance(state, dict)
        kept = {k: v for k, v in state.items() if not _is_ours(k)} if is_mapping else state
        if not is_mapping or kept or not state:
            plain["state"][key] = kept
    return plain


def take_in(state_dict: Mapping[str, Any], base: Any) -> None:
    """Take from a checkpoint what is not the base optimizer's; exactly, in its own precision."""
    aside = state_dict.get(_ASIDE, {})
    memories: dict[int, dict[str, Tensor]] = {
        i: dict(m) for i, m in aside.get("memory", {}).items()
    }
    saved = state_dict["param_groups"] if _is_standard(state_dict) else aside.get("groups", [])
    for group, values in zip(base.param_groups, saved, strict=False):
        group.update({k: values[k] for k in OURS if k in values})
    if _is_standard(state_dict):
        keys = [key for group in saved for key in group["params"]]
        for i, key in enumerate(keys):
            found = state_dict["state"].get(key, {})
            if isinstance(found, dict):
                ours = {k.removeprefix(_PREFIX): v for k, v in found.items() if _is_ours(k)}
                memories.setdefault(i, {}).update(ours)
    elif not aside:
        return  # of the base optimizer alone
    for i, weight in enumerate(_weights(base)):
        memory, values = Memory(base, weight), memories.get(i, {})
        memory.clear()
        for name, value in values.items():
            memory[name] = value.to(weight.device, copy=True)


def knows_rho(base: Any) -> bool:
    """Whether the base optimizer has a setting of its own called rho, as Adadelta."""
    return "rho" in getattr(base, "defaults", {})


def _is_standard(state_dict: Mapping[str, Any]) -> bool:
    return {"state", "param_groups"} <= state_dict.keys()


def _is_ours(key: Any) -> bool:
    return isinstance(key, str) and key.startswith(_PREFIX)


def _weights(base: Any) -> list[Tensor]:
    return [p for group in base.param_groups for p in group["params"]]


def layouts_of(model: nn.Module | None) -> Layouts:
    """Every parameter of the model, its groups and whether it is a transposed convolution's."""
    if model is None:
        return []
    found = {
        id(module.weight): (module.groups, isinstance(module, _ConvTransposeNd))
        for module in model.modules()
        if isinstance(module, _ConvNd)
    }
    return [(p, *found.get(id(p), (1, False))) for p in model.parameters()]


def make_states(
    parameters: Sequence[Tensor], scope: Scope | None, layouts: Layouts
) -> list[ParameterState]:
    """States of the parameters: in the scope or not, and their layout in the model.

    Raises:
        TypeError: the scope is no module and holds what is no parameter.
        ValueError: a parameter of the scope is none of the optimizer's.
    """
    inside = None
    if scope is not None:
        given: Any = scope.parameters() if isinstance(scope, nn.Module) else scope
        chosen = list(given) if isinstance(given, Iterable) else [given]
        wrong = [p for p in chosen if not isinstance(p, Tensor)]
        if wrong:
            got = repr(scope) if isinstance(scope, str | int) else f"a {type(wrong[0]).__name__}"
            raise TypeError(
                f"scope: expected a module or parameters, got {one_line(got)}: write "
                "flatreg.find_head(model, images).layer, or flatreg.last_blocks(model, 2)"
            )
        inside = {id(p) for p in chosen}
        # Frozen ones stay, whoever owns them: an optimizer is often given the others alone.
        missing = len({id(p) for p in chosen if p.requires_grad} - {id(p) for p in parameters})
        if missing or not chosen:
            raise ValueError(
                f"scope: expected parameters of the base optimizer, got {len(chosen)} of which "
                f"{missing} are not its own"
            )
    known = {id(p): (groups, transposed) for p, groups, transposed in layouts}
    return [
        ParameterState(p, 0.0, inside is None or id(p) in inside, *known.get(id(p), (1, False)))
        for p in parameters
    ]


def follow(
    states: Sequence[ParameterState],
    weights: Sequence[Tensor],
    newcomer: Callable[[Tensor], ParameterState],
) -> list[ParameterState]:
    """States in the order of `weights`, after the groups changed.

    A weight that took the place of one that is gone inherits its state: FSDP2 and Accelerate
    replace the parameters in the groups by their shards. Any other new weight is a newcomer.
    """
    known, now = {id(s.weight): s for s in states}, {id(w) for w in weights}
    in_place = len(states) == len(weights)
    found: list[ParameterState] = []
    for i, weight in enumerate(weights):
        state = known.get(id(weight))
        if state is None and in_place and id(states[i].weight) not in now:
            state = states[i]
        found.append(newcomer(weight) if state is None else state)
    return found


def last_blocks(model: nn.Module, count: int) -> list[nn.Parameter]:
    """Parameters of the last `count` blocks of a timm model or of an `nn.Sequential`.

    The head is a block of its own. Blocks are timm's, those of layer-wise learning rates
    (`group_matcher`); those of an `nn.Sequential` are its children that have parameters.

    Raises:
        ValueError: the model does not say what its blocks are, or has fewer.
    """
    blocks = _blocks(model)
    if not 1 <= count <= len(blocks):
        raise ValueError(f"count: expected 1 to {len(blocks)} blocks, got {count}")
    return [p for block in blocks[-count:] for p in block]


def _blocks(model: nn.Module) -> list[list[nn.Parameter]]:
    matcher = getattr(model, "group_matcher", None)
    if matcher is not None:
        from timm.models import group_parameters  # where timm models are, timm is

        named = dict(model.named_parameters())
        layers = group_parameters(model, matcher(coarse=False))
        return [[named[name] for name in names] for names in layers.values()]
    if isinstance(model, nn.Sequential):
        children = [child for child in model if any(True for _ in child.parameters())]
        if len(children) == 1:  # as `with_normalization` wraps a model
            return _blocks(children[0])
        return [list(child.parameters()) for child in children]
    raise ValueError(
        f"{type(model).__name__} has no group_matcher and is no nn.Sequential: "
        "pass the parameters of its last blocks yourself"
    )

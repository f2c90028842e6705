"""LoRA on timm models: only the adapters move, and numbers are those of the merged model."""

import copy
import json

import pytest
import timm
import torch
from cases import PENALTIES
from torch.utils.data import TensorDataset

from flatreg import (
    ASAM,
    AWP,
    GNP,
    GSAM,
    NFGSM,
    SAM,
    WSAM,
    FriendlySAM,
    HeadRelativeSAM,
    LayerFlatness,
    LookSAM,
    Objective,
    RandomSAM,
    RelativeSAM,
    backward,
    evaluate,
    find_head,
    load_model,
    load_recipe,
    measure,
    with_normalization,
)
from flatreg.measures import relative_flatness
from flatreg.run.build import build_training
from flatreg.run.checkpoints import load_checkpoint
from flatreg.run.cli import main
from flatreg.run.export import export

peft = pytest.importorskip("peft", reason="needs peft")

CHEAP = {"parts": ["kappa", "curvature"]}
TARGET = ["qkv", "attn.proj"]
WRAPPERS = {
    **{kind.__name__: kind for kind in (SAM, ASAM, AWP, GSAM, FriendlySAM, RandomSAM)},
    **{kind.__name__: kind for kind in (WSAM, GNP, LookSAM)},
    "RelativeSAM": lambda base, model, x: RelativeSAM(base, model),
    "HeadRelativeSAM": lambda base, model, x: HeadRelativeSAM(base, find_head(model, x).layer),
}


def adapted(**options):
    """A timm ViT behind peft; its adapters do not start at zero."""
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=4, img_size=32)
    settings = {"r": 2, "lora_alpha": 4, "target_modules": TARGET, "modules_to_save": ["head"]}
    model = peft.get_peft_model(network, peft.LoraConfig(**settings | options))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model.eval()


def merged(model):
    return copy.deepcopy(model).merge_and_unload().eval()


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(8, 3, 32, 32, generator=generator)
    with torch.no_grad():
        return x, with_normalization(adapted(), [0.5], [0.5])(x).argmax(1)


def test_terms_are_those_of_the_merged_model(batch):
    """But for the flatness of layers: the factors are layers of their own."""
    wrong = []
    kinds = {type(penalty): penalty for penalty in reversed(PENALTIES)}  # the first of each
    for penalty in (one for kind, one in kinds.items() if kind is not LayerFlatness):
        parts = []
        for model in (adapted(), merged(adapted())):
            torch.manual_seed(1)
            parts.append(Objective(model, NFGSM(eps=0.05), penalty)(*batch).parts)
        same = (torch.allclose(parts[0][k], parts[1][k], rtol=1e-3, atol=1e-4) for k in parts[1])
        wrong += [] if all(same) else [(penalty, parts)]
    assert not wrong


def test_the_head_is_found_and_its_flatness_is_that_of_the_merged_model(batch):
    model, x = adapted(), batch[0]
    head = find_head(model, x)
    assert head.name == "base_model.model.head.modules_to_save.default"
    plain, captured = merged(model), []
    features = plain.forward_head(plain.forward_features(x), pre_logits=True)
    expected = relative_flatness(features, plain(x), plain.head.weight)
    hook = head.layer.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    logits = model(x)
    hook.remove()
    assert torch.allclose(relative_flatness(captured[0], logits, head.weight), expected, rtol=1e-4)


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_only_the_adapters_and_the_head_are_perturbed_and_moved(wrapper, everything, batch):
    x, y = batch
    model = with_normalization(adapted(), [0.5], [0.5])
    weights = [p for p in model.parameters() if everything or p.requires_grad]
    base, make = torch.optim.SGD(weights, lr=0.1), WRAPPERS[wrapper]
    own = wrapper in ("RelativeSAM", "HeadRelativeSAM")
    optimizer = make(base, model, x) if own else make(base)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen = []

    def loss():
        seen.append(moved())
        return torch.nn.functional.cross_entropy(model(x), y)

    def moved():
        return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}

    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    backward(optimizer, loss, model=model)
    assert set().union(*seen) <= trained
    optimizer.step()
    assert moved() and moved() <= trained


def test_it_is_evaluated_and_measured_as_the_merged_model(batch):
    data, results = TensorDataset(*batch), []
    for model in (adapted(), merged(adapted())):
        whole = with_normalization(model, [0.5], [0.5])
        results.append(evaluate(whole, data, eps=0.05, attack="fast", progress=False))
        card = measure(whole, data, eps=0.05, num_probes=2, probed=4, progress=False, **CHEAP)
        assert not card.refused
        results.append(card.kappa.by_outcome.clean.raw.value)
    assert results[0].verdicts == results[2].verdicts
    assert results[1] == pytest.approx(results[3], rel=1e-3)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_dropout": 0.5}])
def test_other_kinds_of_adapters_train(options, batch):
    model = adapted(**options).train()
    torch.autograd.backward(Objective(model, NFGSM(eps=0.05), PENALTIES[0])(*batch).total)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_an_adapter_of_the_head_is_refused(batch):
    model = adapted(target_modules=["head"], modules_to_save=None)
    with pytest.raises(ValueError, match=r"head.lora_B.default\) does not reproduce the logits"):
        find_head(model, batch[0])


# In recipes


@pytest.fixture
def file(tmp_path):
    recipe = {
        "data": {"kind": "digits", "limit": 64},
        "model": {"name": "test_vit", "args": {"img_size": 32}, "mean": [0.5], "std": [0.5]},
        "penalties": [{"kind": "MarginBound", "eps": 0.05}],
        "optimizer": {"lr": 0.01, "wrapper": {"kind": "SAM"}, "args": {"layer_decay": 0.8}},
        "epochs": 1,
        "batch_size": 32,
        "evaluation": {"eps": 0.05, "samples": 8, "attack": "fast"},
    }
    recipe["model"]["lora"] = {"rank": 2, "alpha": 4, "target": TARGET}
    (tmp_path / "lora.yaml").write_text(json.dumps(recipe))
    return tmp_path / "lora.yaml"


def training(file, *overrides):
    recipe = load_recipe(file, overrides)
    return build_training(recipe, recipe.arm, recipe.arms()[recipe.arm], recipe.data.load())


def test_a_recipe_trains_adapters_and_the_head(file):
    built = training(file)
    trained = {name for name, p in built.model.named_parameters() if p.requires_grad}
    assert {"model.head.weight", "model.head.bias"} < trained
    assert all("lora_" in name or name.startswith("model.head.") for name in trained)
    assert sum("lora_A" in name for name in trained) == 2 * len(built.model.model.blocks)


def test_a_trained_model_is_merged_where_it_leaves_the_run(file, tmp_path):
    run = tmp_path / "run"
    assert main(["run", str(file), f"output={run}"]) == 0
    place, built, x = run / "checkpoints/flatreg", training(file), torch.rand(4, 1, 32, 32)
    start = {name: p.detach().clone() for name, p in built.model.named_parameters()}
    assert load_checkpoint(place, built.model)
    for name, weight in built.model.named_parameters():
        assert weight.requires_grad != torch.equal(weight, start[name])
    model = load_model(place)
    assert not any("lora" in name for name, _ in model.named_modules())
    assert torch.allclose(model(x), built.model.eval()(x), atol=1e-5)
    export(run / "flatreg", tmp_path / "out")  # which compares the logits of timm's model


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("{target: [nowhere]}", "lora: Target modules"),
        ("{target: [head]}", "lora.target: the classifier is trained itself"),
        ("{target: [norm1]}", "model test_vit: lora: "),
        ("{target: []}", "at least 1 item"),
        ("{rank: 0, target: [qkv]}", "lora.rank"),
        ("{alpha: 0, target: [qkv]}", "lora.alpha"),
        ("{rank: 8}", "lora.target"),
    ],
)
def test_adapters_of_no_layer_are_refused_in_one_line(file, lora, message, capsys):
    assert main(["check", str(file), f"model.lora={lora}"]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1

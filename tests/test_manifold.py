import copy
import dataclasses
import os

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from flatreg.measures.manifold import IdentityManifold, LocalPCAManifold, Manifold, PCAManifold

SHAPE = (1, 4, 3)


def pictures(n=60, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, *SHAPE, generator=generator, dtype=torch.float64).to(dtype)


def fitted_ones(dtype=torch.float32):
    images = pictures(dtype=dtype)
    return {
        "identity": IdentityManifold(),
        "pca": PCAManifold(rank=4).fit(images),
        "local": LocalPCAManifold(rank=3, neighbours=6).fit(images),
    }


@pytest.fixture(scope="module")
def fitted():
    return fitted_ones()


def inner(a, b):
    return (a * b).flatten(1).sum(1)


@pytest.mark.parametrize("kind", ["identity", "pca", "local"])
@pytest.mark.parametrize("dtype,digits", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**20))
def test_a_split_is_an_orthogonal_projection(fitted, kind, dtype, digits, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(5, *SHAPE, generator=generator).to(dtype)
    v, w = torch.randn(2, 5, *SHAPE, generator=generator).to(dtype)
    split = fitted[kind].split
    (tangent, normal), (other_tangent, other) = split(x, v), split(x, w)
    close = dict(rtol=0, atol=20 * digits)
    torch.testing.assert_close(tangent + normal, v, **close)
    torch.testing.assert_close(split(x, normal)[1], normal, **close)
    torch.testing.assert_close(split(x, tangent)[0], tangent, **close)
    torch.testing.assert_close(inner(tangent, other), torch.zeros(5, dtype=dtype), **close)
    torch.testing.assert_close(inner(v, other), inner(normal, w), **close)
    torch.testing.assert_close(inner(v, other_tangent), inner(tangent, w), **close)
    assert tangent.dtype == normal.dtype == dtype and tangent.shape == v.shape


@pytest.mark.parametrize("kind,rank", [("identity", 0), ("pca", 4), ("local", 3)])
def test_the_tangent_space_has_its_dimension_and_is_a_constant_map(fitted, kind, rank):
    x = pictures(1, seed=1).double().requires_grad_()
    v = torch.randn(1, *SHAPE, dtype=torch.float64, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(lambda v: fitted[kind].split(x, v)[0], v)
    eigenvalues = torch.linalg.eigvalsh(jacobian.reshape(12, 12))
    expected = torch.cat([torch.zeros(12 - rank), torch.ones(rank)]).double()
    torch.testing.assert_close(eigenvalues, expected, rtol=0, atol=1e-6)
    tangent = fitted[kind].split(x, v.detach())[0]
    assert not tangent.requires_grad  # the projector is no function of x to be differentiated


def exact_subspace(images, rank):
    flat = images.flatten(1).double()
    _, s, v = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    return v[:rank], float((s[:rank] ** 2).sum() / (s**2).sum())


def dense(manifold):
    """Tangent projector (pixels, pixels) of a PCAManifold, in float64."""
    rows = torch.eye(12, dtype=torch.float64).reshape(12, *SHAPE)
    return manifold.split(rows, rows)[0].flatten(1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_pca_finds_the_subspace_that_svd_finds(dtype):
    spread = torch.linspace(1, 0.1, 12).reshape(SHAPE)
    images = 0.5 + (pictures(200, dtype=torch.float64) - 0.5) * spread
    images = (255 * images).round().byte() if dtype == torch.uint8 else images.to(dtype)
    manifold = PCAManifold(rank=4, oversampling=8).fit(images)
    unit = images.double() / 255 if dtype == torch.uint8 else images
    basis, share = exact_subspace(unit, 4)
    digits = 1e-9 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(dense(manifold), basis.T @ basis, rtol=0, atol=digits)
    assert manifold.explained_variance == pytest.approx(share, rel=max(digits, 1e-5))


def test_oversampling_and_power_iterations_make_up_for_a_narrow_start():
    """More pixels than directions, a slowly falling spectrum: error against the exact subspace."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(300, 100, generator=generator) * torch.arange(1, 101) ** -0.5
    mixing = torch.linalg.qr(torch.randn(100, 100, generator=generator))[0]
    images = (0.5 + 0.02 * factors @ mixing).clamp(0, 1)[:, None]
    exact, _ = exact_subspace(images, 5)

    def error(**given):
        basis = PCAManifold(rank=5, **given).fit(images).fitted.basis.double()
        return float(torch.linalg.matrix_norm(basis - basis @ exact.T @ exact))

    rough = error(oversampling=0, power_iterations=0)
    assert error(power_iterations=8, oversampling=20) < 0.01 < 0.5 < rough


class Stream:
    """Batches with labels beside them, as a DataLoader gives them."""

    def __init__(self, images, size=7):
        self.images, self.size, self.passes = images, size, 0

    def __iter__(self):
        self.passes += 1
        for batch in self.images.split(self.size):
            yield [batch, torch.zeros(len(batch))]


def test_a_stream_gives_what_a_tensor_gives():
    images = pictures(dtype=torch.float64)
    stream = Stream(images)
    streamed = PCAManifold(rank=3, power_iterations=2).fit(stream)
    assert stream.passes == 4
    whole = PCAManifold(rank=3, power_iterations=2).fit(images)
    torch.testing.assert_close(dense(streamed), dense(whole))
    assert streamed.explained_variance == pytest.approx(whole.explained_variance)
    local = LocalPCAManifold(rank=2).fit(Stream(images))
    assert torch.equal(local.fitted.images, images)


def test_directions_without_variance_are_not_tangent():
    images = torch.full((50, 6), 0.5)
    images[:, :2] = torch.rand(50, 2)  # four pixels never change
    manifold = PCAManifold(rank=4).fit(images)
    tangent = manifold.split(images, torch.eye(6)[:, None].expand(6, 50, 6)[5])[0]
    assert manifold.fitted.basis.shape == (2, 6) and float(tangent.abs().max()) < 1e-5
    assert manifold.explained_variance == pytest.approx(1)
    local = LocalPCAManifold(rank=4, neighbours=8).fit(images)
    normal = local.split(images, torch.eye(6)[5].expand(50, 6))[1]
    torch.testing.assert_close(normal, torch.eye(6)[5].expand(50, 6))


def test_the_fit_is_reproducible_and_its_seed_matters_little():
    images = pictures()
    one, same = (PCAManifold(rank=3, seed=0).fit(images) for _ in range(2))
    assert torch.equal(one.fitted.basis, same.fitted.basis)
    other = PCAManifold(rank=3, seed=1).fit(images)
    assert not torch.equal(one.fitted.basis, other.fitted.basis)


@pytest.mark.parametrize("seed", [0, 1])
def test_local_pca_recovers_a_plane(seed):
    generator = torch.Generator().manual_seed(seed)
    plane = torch.linalg.qr(torch.randn(10, 2, generator=generator, dtype=torch.float64))[0]
    images = 0.5 + 0.1 * torch.randn(200, 2, generator=generator, dtype=torch.float64) @ plane.T
    manifold = LocalPCAManifold(rank=2, neighbours=6).fit(images)
    v = torch.randn(20, 10, generator=generator, dtype=torch.float64)
    x = images[:20] + 0.01 * torch.randn(20, 10, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(manifold.split(x, v)[0], v @ plane @ plane.T)
    assert manifold.explained_variance == pytest.approx(1)


def test_local_pca_follows_a_sphere_where_one_subspace_cannot():
    """The radius is the normal of a sphere in three of ten pixels, at every point another."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(3000, 3, generator=generator, dtype=torch.float64)
    points = points / points.norm(dim=1, keepdim=True)
    images = torch.full((3000, 10), 0.5, dtype=torch.float64)
    images[:, :3] += 0.4 * points
    local = LocalPCAManifold(rank=2, neighbours=12).fit(images)
    radius = torch.zeros(50, 10, dtype=torch.float64)
    radius[:, :3] = points[:50]
    tangent, _ = local.split(images[:50], radius)
    assert float(tangent.norm(dim=1).mean()) < 0.1
    assert (
        float(PCAManifold(rank=2).fit(images).split(images[:50], radius)[0].norm(dim=1).mean())
        > 0.5
    )


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**20), count=st.integers(1, 5))
def test_neighbours_are_the_nearest_other_images(seed, count):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(100, 12, generator=generator, dtype=torch.float64)
    distances = torch.cdist(images, images).fill_diagonal_(torch.inf)
    found = LocalPCAManifold(rank=1, neighbours=count).fit(images).fitted
    assert torch.equal(found.neighbours, distances.topk(count, largest=False).indices)


def test_tangent_spaces_are_kept_up_to_a_limit(monkeypatch):
    images, v = pictures(), torch.randn(60, *SHAPE)
    kept = LocalPCAManifold(rank=3, neighbours=6).fit(images)
    first = kept.split(images, v)[0]
    assert len(kept.fitted._tangents) == 60
    monkeypatch.setattr(kept.fitted, "tangent_bases", None)  # not needed any more
    assert torch.equal(kept.split(images.flip(0), v.flip(0))[0], first.flip(0))
    monkeypatch.setattr("flatreg.measures.tangent_spaces._CACHE_BYTES", 0)
    none = LocalPCAManifold(rank=3, neighbours=6).fit(images)
    assert torch.equal(none.split(images, v)[0], first) and not none.fitted._tangents


def test_the_tangent_space_is_that_of_the_nearest_image(fitted):
    images, local = pictures(), fitted["local"]
    v = torch.randn(60, *SHAPE)
    order = torch.randperm(60)
    here = local.split(images, v)[0]
    torch.testing.assert_close(local.split(images[order], v[order])[0], here[order])
    torch.testing.assert_close(local.split(images + 1e-4, v)[0], here)
    index = local.fitted.neighbours[:3]
    offsets = (images[index] - images[:3, None]).flatten(2).double()
    bases = torch.linalg.svd(offsets, full_matrices=False)[2][:, :3]
    flat = v[:3].flatten(1).double()
    exact = torch.einsum("brd,bre,be->bd", bases, bases, flat).reshape(3, *SHAPE)
    torch.testing.assert_close(here[:3].double(), exact, rtol=0, atol=1e-5)


def test_inputs_changed_in_place_get_the_tangent_space_of_what_they_are_now(fitted):
    local, images = fitted["local"], pictures()
    x, v = images[:4].clone(), torch.randn(4, *SHAPE)
    first = local.split(x, v)[0]
    assert torch.equal(local.split(x.detach(), v)[0], first)  # the same memory
    x.copy_(images[10:14])
    torch.testing.assert_close(local.split(x, v)[0], local.split(images[10:14].clone(), v)[0])
    assert not torch.equal(local.split(x, v)[0], first)
    with torch.inference_mode():
        y = images[:4].clone()
        torch.testing.assert_close(local.split(y, v)[0], first)
        y.copy_(images[10:14])
        assert not torch.equal(local.split(y, v)[0], first)


@pytest.mark.parametrize("kind", ["pca", "local"])
def test_a_split_in_inference_mode_spoils_no_later_training(kind):
    manifold, x = fitted_ones()[kind], pictures(4)
    with torch.inference_mode():
        manifold.split(x, torch.randn(4, *SHAPE))
    v = torch.randn(4, *SHAPE, requires_grad=True)
    tangent = manifold.split(x, v)[0]
    (pulled,) = torch.autograd.grad(tangent.square().sum() / 2, v)
    torch.testing.assert_close(pulled, tangent.detach())


@pytest.mark.parametrize("kind", ["pca", "local"])
def test_projections_are_taken_in_float32_under_autocast_and_of_halves(fitted, kind):
    x, v = pictures(5, seed=2), torch.randn(5, *SHAPE)
    plain = fitted[kind].split(x, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = fitted[kind].split(x.clone(), v)
    for part, same in zip(plain, cast, strict=True):
        assert torch.equal(part, same)
    tangent, normal = fitted[kind].split(x.bfloat16(), v.bfloat16())
    assert tangent.dtype == normal.dtype == torch.bfloat16
    if kind == "pca":  # rounded once, at the end
        exact = fitted[kind].split(x, v.bfloat16().float())[0]
        torch.testing.assert_close(tangent, exact.bfloat16())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("unfitted", [PCAManifold(rank=3), LocalPCAManifold(rank=3, neighbours=5)])
def test_a_saved_manifold_comes_back_bit_by_bit(tmp_path, unfitted, dtype):
    images = (255 * pictures()).byte() if dtype == torch.uint8 else pictures()
    manifold, path = unfitted.fit(images), tmp_path / "manifold.safetensors"
    manifold.save(path)
    loaded = type(manifold).load(path)
    assert loaded == manifold and os.listdir(tmp_path) == ["manifold.safetensors"]
    x, v = pictures(5, seed=3), torch.randn(5, *SHAPE)
    for part, same in zip(manifold.split(x, v), loaded.split(x, v), strict=True):
        assert torch.equal(part, same)
    assert loaded.explained_variance == manifold.explained_variance
    before = path.read_bytes()
    loaded.save(path)
    assert path.read_bytes() == before


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, fitted):
    path = tmp_path / "manifold.safetensors"
    fitted["pca"].save(path)
    before = path.read_bytes()

    def half_written(tensors, name, metadata):
        with open(name, "wb") as file:
            file.write(b"half")
        raise safetensors.SafetensorError("no space left on device")

    monkeypatch.setattr("flatreg.data.files.save_file", half_written)
    with pytest.raises(OSError, match="could not be written: no space left"):
        PCAManifold(rank=2).fit(pictures()).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_a_file_of_something_else_is_refused(tmp_path, fitted):
    path = tmp_path / "manifold.safetensors"
    fitted["pca"].save(path)
    with pytest.raises(ValueError, match="expected a LocalPCAManifold, got PCAManifold"):
        LocalPCAManifold.load(path)
    safetensors.torch.save_file({"basis": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="other bytes than flatreg wrote"):
        PCAManifold.load(path)


@pytest.mark.parametrize("unfitted", [PCAManifold(rank=3), LocalPCAManifold(rank=3)])
def test_unfitted_use_is_refused(tmp_path, unfitted):
    name = type(unfitted).__name__
    for use in (
        lambda: unfitted.split(pictures(), pictures()),
        lambda: unfitted.explained_variance,
        lambda: unfitted.save(tmp_path / "m.safetensors"),
    ):
        with pytest.raises(ValueError, match=rf"^{name} is not fitted: call .fit\(images\) first$"):
            use()


@pytest.mark.parametrize("kind", ["pca", "local"])
def test_images_of_another_shape_are_refused(fitted, kind):
    other = torch.rand(2, 3, 2, 2)
    with pytest.raises(
        ValueError, match=r"^the manifold was fitted to images of shape \(1, 4, 3\)"
    ):
        fitted[kind].split(other, other)


@pytest.mark.parametrize(
    "fit,message",
    [
        (lambda: PCAManifold(rank=9).fit(pictures(9)), "rank must be at most 8 for 9 images of 12"),
        (lambda: PCAManifold(rank=13).fit(pictures()), "rank must be at most 12 for 60 images"),
        (lambda: PCAManifold(rank=2).fit(iter([pictures()])), "passed through several times"),
        (lambda: PCAManifold(rank=2).fit([pictures(), torch.rand(2, 5)]), "must have one shape"),
        (lambda: PCAManifold(rank=2).fit(3 * pictures()), r"inputs must be images in \[0, 1\]"),
        (lambda: LocalPCAManifold(rank=2).fit(3 * pictures()), r"must be images in \[0, 1\]"),
        (lambda: LocalPCAManifold(rank=2).fit(pictures(16)), "16 neighbours need more than 16"),
    ],
)
def test_what_cannot_be_fitted_is_refused(fit, message):
    with pytest.raises(ValueError, match=message):
        fit()


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Penalty:
    strength: float
    manifold: Manifold = Field(default_factory=IdentityManifold)


def test_a_manifold_is_read_from_its_configuration():
    read = TypeAdapter(Manifold).validate_python
    assert read({"kind": "PCAManifold", "rank": 16}) == PCAManifold(rank=16)
    assert read({"kind": "LocalPCAManifold", "rank": 2}) == LocalPCAManifold(rank=2)
    assert read({"kind": "IdentityManifold"}) == IdentityManifold()
    for wrong in (
        {"kind": "PCAManifold", "rank": 0},
        {"kind": "PCAManifold", "rank": 2, "fitted": [[1.0]]},
        {"kind": "LocalPCAManifold", "rank": 9, "neighbours": 8},
        {"kind": "PCAManifold", "rank": 2, "neighbours": 8},
    ):
        with pytest.raises(ValueError):
            read(wrong)


@pytest.mark.parametrize("kind", ["pca", "local"])
def test_a_fitted_manifold_keeps_its_tensors_inside_a_penalty(fitted, kind):
    manifold = fitted[kind]
    penalty = Penalty(strength=1, manifold=manifold)
    again = TypeAdapter(Penalty).validate_python(penalty)
    for holder in (penalty, again, dataclasses.replace(penalty, strength=2)):
        assert holder.manifold is manifold
    assert dataclasses.replace(manifold).fitted is manifold.fitted
    v = torch.randn(2, *SHAPE)
    copied = copy.deepcopy(penalty).manifold.split(v, v)[0]
    assert torch.equal(copied, manifold.split(v, v)[0])


@pytest.mark.parametrize("kind", ["pca", "local"])
def test_a_fitted_manifold_is_configured_as_an_unfitted_one(fitted, kind):
    manifold = fitted[kind]
    unfitted = dataclasses.replace(manifold, fitted=None)
    assert manifold == unfitted and hash(manifold) == hash(unfitted)
    assert repr(manifold) == repr(unfitted) and "fitted" not in repr(manifold)
    dumped = TypeAdapter(Penalty).dump_python(Penalty(strength=1, manifold=manifold), mode="json")
    assert set(dumped["manifold"]) == {f.name for f in dataclasses.fields(manifold)} - {"fitted"}
    assert TypeAdapter(Penalty).validate_python(dumped).manifold == unfitted
    assert TypeAdapter(Penalty).json_schema()


def test_other_hyperparameters_do_not_inherit_a_fit(fitted):
    with pytest.raises(ValueError, match="rank is 3 but 4 components were fitted: fit again"):
        dataclasses.replace(fitted["pca"], rank=3)
    with pytest.raises(ValueError, match="neighbours is 7 but 6 were found by the fit"):
        dataclasses.replace(fitted["local"], neighbours=7)

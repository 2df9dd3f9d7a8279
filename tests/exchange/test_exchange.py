"""SAEs of other libraries do here what they do there, and ours there what they do here."""

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from saeflow.batch import Batch
from saeflow.config.variants import with_defaults
from saeflow.errors import UserError
from saeflow.exchange import FORMATS, export_sae, import_sae, plain_of, sae_of
from saeflow.exchange.plain import Plain
from saeflow.saes import SAE, build, load, save
from saeflow.saes.variants import VARIANTS

D_IN, D_SAE, ROWS = 12, 40, 64
CONSTANT = {"kind": "constant"}
TOPK = {"k": 5, "k_schedule": CONSTANT, "auxk_weight": 0.0}
BATCH = {**TOPK, "threshold_start_step": 0}
OURS: dict[str, dict[str, Any]] = {
    "relu": {"l1": 0.1, "l1_schedule": CONSTANT},
    "p_anneal": {
        "l1": 0.1, "l1_schedule": CONSTANT, "p_end": 0.2, "p_updates": 10, "anneal_start": 0.5,
    },
    "topk": TOPK,
    "batch_topk": BATCH,
    "matryoshka": {**BATCH, "groups": {"fractions": [0.25, 0.25]}},
    "jumprelu": {
        "l0_weight": 1.0, "l0_schedule": CONSTANT, "target_l0": None, "target_schedule": CONSTANT,
        "threshold": 0.1, "bandwidth": 0.1,
    },
    "gated": {"l1": 0.1, "l1_schedule": CONSTANT},
    "feature_choice": BATCH,
}  # fmt: skip
STATED = {
    **OURS, "abs_topk": {"k": 5}, "soft_topk": {"k": 5}, "adaptive_k": {"complexity": "scores", "k_min": 2, "k_max": 10},
    "entmax": {"alpha": 1.5},
}  # fmt: skip
THEIRS = {
    "saelens": [
        "standard", "standard, x as it is", "topk", "topk, rescaled", "jumprelu", "gated",
    ],
    "dictionary_learning": [
        "AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE", "GatedAutoEncoder",
        "JumpReluAutoEncoder",
    ],
}  # fmt: skip
ABOUT = {"name": "s/h/e/r", "entry": "e", "source": "s", "hook_point": "h", "seed": 0}
LIBRARIES = sorted(FORMATS)


def drawn(variant: str) -> SAE:
    """An SAE of random weights, some thresholds above 0."""
    torch.manual_seed(list(OURS).index(variant))
    sae = build(variant, D_IN, D_SAE, OURS[variant])
    state = {
        name: torch.randn_like(part) * 0.4 for name, part in sae.state_dict().items() if part.ndim
    }
    state["W_dec"] = torch.nn.functional.normalize(state["W_dec"])
    if "threshold" in sae.state_dict():
        state["threshold"] = torch.full_like(sae.threshold, 0.3)
        if sae.threshold.ndim:
            state["threshold"].copy_(torch.linspace(0, 0.6, D_SAE))
    sae.load_state_dict(sae.state_dict() | state)
    return sae.eval()


def saved(variant: str, folder: Path) -> Path:
    folder.mkdir(parents=True)
    sae = drawn(variant)
    facts = {"variant": variant, "options": OURS[variant], "d_in": D_IN, "d_sae": D_SAE, **ABOUT}
    save(sae.state_dict(), folder, facts)
    return folder


def rows() -> torch.Tensor:
    return torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(0)) * 2


@torch.no_grad()
def same(sae: SAE, latents: torch.Tensor, x_hat: torch.Tensor, x: torch.Tensor) -> None:
    assert (latents != 0).any()
    torch.testing.assert_close(sae.encode(x), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.decode(latents), x_hat, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def traded(foreign: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ours as exported and applied there, theirs as saved and applied there."""
    folder = tmp_path_factory.mktemp("traded")
    jobs = []
    for library in LIBRARIES:
        for variant in OURS:
            out = folder / library / variant
            out.mkdir(parents=True)
            export_sae(saved(variant, folder / "ours" / library / variant), library, out)
            save_file({"x": rows()}, out / "x.safetensors")
            jobs.append({"do": "apply", "library": library, "folder": out})
        for kind in THEIRS[library]:
            jobs.append(
                {
                    "do": "save",
                    "library": library,
                    "kind": kind,
                    "folder": folder / library / f"their {kind}",
                }
            )
    foreign(folder, jobs)
    return folder


PURSUIT = {"residual_threshold": 2.0, "max_iterations": None, "stop_on_duplicate_support": True}
ENCODERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "abs_topk": ("abs_topk", TOPK, {"k": 5, "rescale_acts_by_decoder_norm": False}),
    "matching_pursuit": ("matching_pursuit", PURSUIT, PURSUIT),
    "matching_pursuit that may repeat": (
        "matching_pursuit",
        PURSUIT | {"stop_on_duplicate_support": False, "max_iterations": 7},
        PURSUIT | {"stop_on_duplicate_support": False, "max_iterations": 7},
    ),
    "matching_pursuit without a threshold": (
        "matching_pursuit", PURSUIT | {"residual_threshold": 0.0}, PURSUIT | {"residual_threshold": 0.0},
    ),
}  # fmt: skip
"""By case: variant, its options, and those of SAELens's SAE of the same name."""


def test_encoders_of_saelens_give_the_latents_of_ours(foreign: Any, tmp_path: Path) -> None:
    jobs, ours = [], {}
    for seed, (case, (variant, options, theirs)) in enumerate(ENCODERS.items()):
        torch.manual_seed(seed)
        folder = tmp_path / case
        folder.mkdir()
        sae = ours[case] = build(variant, D_IN, D_SAE, options).eval()
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.4)
            sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
        weights = {name: part.detach().contiguous() for name, part in sae.named_parameters()}
        save_file(weights, folder / "weights.safetensors")
        save_file({"x": rows()}, folder / "x.safetensors")
        jobs.append({"do": "encode", "kind": variant, "options": theirs, "folder": folder})
    foreign(tmp_path, jobs)
    for case, sae in ours.items():
        there = load_file(tmp_path / case / "expected.safetensors")
        same(sae, there["latents"], there["x_hat"], there["x"])
        assert len(set((there["latents"] != 0).sum(1).tolist())) > 1 or case == "abs_topk"


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("variant", OURS)
def test_what_we_export_does_the_same_there(traded: Path, library: str, variant: str) -> None:
    there = load_file(traded / library / variant / "expected.safetensors")
    same(load(traded / "ours" / library / variant), there["latents"], there["x_hat"], there["x"])


@pytest.mark.parametrize(
    ("library", "kind"), [(lib, kind) for lib in LIBRARIES for kind in THEIRS[lib]]
)
def test_what_they_saved_does_the_same_here(
    traded: Path, library: str, kind: str, tmp_path: Path
) -> None:
    folder = traded / library / f"their {kind}"
    there = load_file(folder / "expected.safetensors")
    import_sae(folder, library, ABOUT, tmp_path)
    sae = load(tmp_path)
    with torch.no_grad():
        norm = sae.W_dec.norm(dim=1)
        latents = there["latents"]
        if kind == "AutoEncoder" or "rescaled" in kind:
            torch.testing.assert_close(norm, torch.ones(D_SAE))
        torch.testing.assert_close(sae(there["x"]), there["x_hat"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sae.encode(there["x"]), latents, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("variant", OURS)
def test_a_round_trip_through_files_changes_nothing(
    library: str, variant: str, tmp_path: Path
) -> None:
    plain = plain_of(drawn(variant))
    FORMATS[library].write(plain, tmp_path, {})
    back = FORMATS[library].read(tmp_path)
    assert back.kind == plain.kind
    x = rows()
    with torch.no_grad():
        ours, theirs = sae_of(plain)[2], sae_of(back)[2]
        same(theirs, ours.encode(x), ours(x), x)


@pytest.mark.parametrize("variant", OURS)
def test_plain_says_what_the_variant_does(variant: str) -> None:
    sae, x = drawn(variant), rows()
    plain = plain_of(sae)
    a = (x - plain.b_dec) @ plain.W_enc + plain.b_enc
    match plain.kind:
        case "relu":
            latents = a.clamp(min=0)
        case "topk":
            least = a.clamp(min=0).sort(descending=True).values[:, 4:5]
            latents = torch.where(a >= least, a.clamp(min=0), 0)
        case "jumprelu":
            latents = torch.where(a > plain.threshold, a.clamp(min=0), 0)
        case "gated":
            assert plain.r_mag is not None
            assert plain.b_mag is not None
            u = (x - plain.b_dec) @ plain.W_enc
            latents = (a > 0) * (u * plain.r_mag.exp() + plain.b_mag).clamp(min=0)
    same(sae, latents, latents @ plain.W_dec + plain.b_dec, x)


# Foreign files may hold anything.


def files(library: str, folder: Path) -> list[Path]:
    folder.mkdir(parents=True)
    FORMATS[library].write(plain_of(drawn("jumprelu")), folder, {})
    return sorted(folder.iterdir())


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_missing_file_is_named(library: str, tmp_path: Path) -> None:
    for number in range(2):
        path = files(library, tmp_path / str(number))[number]
        path.unlink()
        with pytest.raises(UserError, match=path.name):
            FORMATS[library].read(path.parent)


@pytest.mark.parametrize("library", LIBRARIES)
def test_damaged_files_are_refused_or_read_as_an_sae(library: str, tmp_path: Path) -> None:
    """Any byte flipped, any end cut off: one line, or (a flipped bit of a number) a whole SAE."""
    generator = torch.Generator().manual_seed(0)
    paths = files(library, tmp_path / "whole")
    refused = 0
    for path in paths:
        whole = path.read_bytes()
        for trial in range(150):
            place = int(torch.randint(len(whole), (), generator=generator))
            bit = 1 << int(torch.randint(8, (), generator=generator))
            flipped = whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :]
            path.write_bytes(whole[:place] if trial % 3 == 0 else flipped)
            try:
                assert isinstance(FORMATS[library].read(path.parent), Plain)
            except UserError as error:
                assert str(path.parent) in str(error)  # noqa: PT017
                refused += 1
        path.write_bytes(whole)
    assert refused > 100


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("key", ["every", "shape", "not finite"])
def test_wrong_contents_are_named(library: str, key: str, tmp_path: Path) -> None:
    config, weights = sorted(
        files(library, tmp_path / "sae"), key=lambda path: path.suffix != ".json"
    )
    pt = weights.suffix == ".pt"
    tensors = torch.load(weights, weights_only=True) if pt else load_file(weights)
    match key:
        case "every":
            config.write_text("{}")
        case "shape":
            tensors["b_enc"] = tensors["b_enc"][:-1].clone()
        case _:
            tensors["b_enc"][0] = float("nan")
    torch.save(tensors, weights) if pt else save_file(tensors, weights)
    expected = {"every": "missing", "shape": "shape|fit each other", "not finite": "finite"}[key]
    with pytest.raises(UserError, match=expected):
        FORMATS[library].read(tmp_path / "sae")


class Trap:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    paths = files("dictionary_learning", tmp_path / "sae")
    trap = tmp_path / "ran"
    buffer = io.BytesIO()
    torch.save({"W_enc": Trap(trap)}, buffer)
    for bytes_ in (buffer.getvalue(), pickle.dumps(Trap(trap))):
        paths[0].write_bytes(bytes_)
        with pytest.raises(UserError, match="damaged"):
            FORMATS["dictionary_learning"].read(tmp_path / "sae")
        assert not trap.exists()
    pickle.loads(pickle.dumps(Trap(trap)))  # noqa: S301
    assert trap.exists()  # so the trap is one


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_every_variant_is_written_or_refused_in_one_line(
    variant: str, library: str, tmp_path: Path
) -> None:
    """Also with the defaults of each variant that chooses its latents by input, such as the Sparsemax SAE."""
    options = with_defaults(variant, STATED.get(variant, {}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sae = build(variant, D_IN, D_SAE, options)
        sae.initialise(Batch.of(torch.randn(ROWS, D_IN)), torch.Generator().manual_seed(0))
    config = {"variant": variant, "options": options, "d_in": D_IN, "d_sae": D_SAE, **ABOUT}
    (tmp_path / "sae").mkdir()
    (tmp_path / "out").mkdir()
    save(sae.state_dict(), tmp_path / "sae", config)
    if variant in OURS:
        export_sae(tmp_path / "sae", library, tmp_path / "out")
        assert list((tmp_path / "out").iterdir())
        return
    with pytest.raises(
        UserError, match=r"found one that chooses its latents otherwise\. Take --library hub"
    ):
        export_sae(tmp_path / "sae", library, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_an_unknown_library_is_refused(tmp_path: Path) -> None:
    folder = saved("topk", tmp_path / "sae")
    with pytest.raises(UserError, match="expected one of"):
        export_sae(folder, "nonesuch", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert config["entry"] == "e"

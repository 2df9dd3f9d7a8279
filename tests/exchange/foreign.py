"""Run other libraries on SAEs, in their own environment: `python foreign.py JOBS`.

JOBS is a JSON list of {do, library, folder, ...}: `save` writes an SAE of random weights as the library does,
with rows x and the library's own latents and reconstructions of them (expected.safetensors); `apply` loads one
and writes what it makes of rows that are there (x.safetensors); `encode` gives SAELens's SAE of a kind weights that are
there (weights.safetensors) and writes the same; `read dashboards` passes latents through the classes of SAEDashboard and
Neuronpedia's client.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

D_IN, D_SAE, K, ROWS = 12, 40, 5, 64


def read_dashboards(folder):
    """Latents as the other libraries' own classes hold them, written down again."""
    from neuronpedia.np_activation import Activation
    from neuronpedia.np_feature import Feature, Logit
    from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch

    def logits(found):
        return None if found is None else [Logit(**one) for one in found]

    def feature(told):
        own = {"activations": [Activation(**one) for one in told["activations"]]}
        own |= {name: logits(told[name]) for name in ("top_logits", "bottom_logits")}
        return asdict(Feature(**told | own))

    for path in sorted(Path(folder).glob("batch-*.json")):
        batch = NeuronpediaDashboardBatch(**json.loads(path.read_text()))
        path.with_suffix(".again").write_text(json.dumps(batch.to_dict()))
    for path in sorted(Path(folder).glob("features-*.json")):
        features = [feature(told) for told in json.loads(path.read_text())]
        path.with_suffix(".again").write_text(json.dumps(features))


def saelens_sae(kind):
    from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    size = {"d_in": D_IN, "d_sae": D_SAE}
    match kind:
        case "standard":
            return StandardSAE(StandardSAEConfig(**size))
        case "standard, x as it is":
            return StandardSAE(StandardSAEConfig(**size, apply_b_dec_to_input=False))
        case "topk":
            return TopKSAE(TopKSAEConfig(**size, k=K, rescale_acts_by_decoder_norm=False))
        case "topk, rescaled":
            return TopKSAE(TopKSAEConfig(**size, k=K, rescale_acts_by_decoder_norm=True))
        case "jumprelu":
            return JumpReLUSAE(JumpReLUSAEConfig(**size))
        case "gated":
            return GatedSAE(GatedSAEConfig(**size))


def dictionary_learning_sae(kind):
    from dictionary_learning import dictionary
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    match kind:
        case "AutoEncoder":
            return dictionary.AutoEncoder(D_IN, D_SAE)
        case "AutoEncoderTopK":
            return AutoEncoderTopK(D_IN, D_SAE, K)
        case "BatchTopKSAE":
            return BatchTopKSAE(D_IN, D_SAE, K)
        case "MatryoshkaBatchTopKSAE":
            return MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, [D_SAE // 4, D_SAE - D_SAE // 4])
        case "GatedAutoEncoder":
            return dictionary.GatedAutoEncoder(D_IN, D_SAE)
        case "JumpReluAutoEncoder":
            return dictionary.JumpReluAutoEncoder(D_IN, D_SAE)


def with_weights(kind, options, folder):
    from sae_lens.saes.abstopk_sae import AbsTopKSAE, AbsTopKSAEConfig
    from sae_lens.saes.matching_pursuit_sae import MatchingPursuitSAE, MatchingPursuitSAEConfig

    made, config = {
        "abs_topk": (AbsTopKSAE, AbsTopKSAEConfig),
        "matching_pursuit": (MatchingPursuitSAE, MatchingPursuitSAEConfig),
    }[kind]
    sae = made(config(d_in=D_IN, d_sae=D_SAE, **options))
    weights = load_file(folder / "weights.safetensors")
    names = [name for name, _ in sae.named_parameters()]
    sae.load_state_dict({name: weights[name] for name in names})
    return sae


def load(library, folder):
    if library == "saelens":
        from sae_lens import SAE

        return SAE.load_from_disk(folder)
    from dictionary_learning.utils import load_dictionary

    return load_dictionary(str(folder), device="cpu")[0]


def save(library, kind, folder):
    sae = saelens_sae(kind) if library == "saelens" else dictionary_learning_sae(kind)
    for name, part in sae.state_dict().items():
        if not part.is_floating_point():
            continue
        positive = name in ("threshold",)
        with torch.no_grad():
            part.copy_(torch.rand(part.shape) * 0.5 if positive else torch.randn(part.shape) * 0.4)
    if library == "saelens":
        sae.save_model(folder)
        return
    torch.save(sae.state_dict(), folder / "ae.pt")
    trainer = {
        "dict_class": kind,
        "activation_dim": D_IN,
        "dict_size": D_SAE,
        "k": K,
        "lm_name": "none",
    }
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))


def encode(sae, x):
    if hasattr(sae, "use_threshold") or type(sae).__name__ == "MatryoshkaBatchTopKSAE":
        return sae.encode(x, use_threshold=True)
    return sae.encode(x)


@torch.no_grad()
def main(jobs):
    for seed, job in enumerate(jobs):
        torch.manual_seed(seed)
        folder = Path(job["folder"])
        if job["do"] == "read dashboards":
            read_dashboards(folder)
            continue
        if job["do"] == "save":
            folder.mkdir(parents=True)
            save(job["library"], job["kind"], folder)
            x = torch.randn(ROWS, D_IN) * 2
        else:
            x = load_file(folder / "x.safetensors")["x"]
        if job["do"] == "encode":
            sae = with_weights(job["kind"], job["options"], folder)
        else:
            sae = load(job["library"], folder)
        latents = encode(sae, x)
        found = {"x": x, "latents": latents, "x_hat": sae.decode(latents)}
        save_file(
            {name: part.contiguous() for name, part in found.items()},
            folder / "expected.safetensors",
        )


main(json.loads(Path(sys.argv[1]).read_text()))

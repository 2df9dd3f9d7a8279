"""Run SAEBench and sae-probes on adapted SAEs, in their own environment: `python adapted.py JOBS`.

JOBS is a JSON list of {do, folder, ...}; each job reads what lies in its folder and writes there what the libraries'
own functions find: `core`, `sparse_probing` and `absorption` of sae_bench, `probes` of sae_probes. No hub, no model
but a tiny one of random weights.
"""

import contextlib
import json
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from saeflow.exchange import adapt

D_IN, HOOK, MODEL = 12, "blocks.1.hook_resid_post", "tiny"


def model():
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    return HookedTransformer(
        HookedTransformerConfig(
            n_layers=3, d_model=D_IN, n_ctx=16, d_head=6, n_heads=2, d_vocab=50, act_fn="gelu", seed=0
        )
    )  # fmt: skip


def taken(folder):
    """An adapted SAE as SAEBench takes one in: no word about decoder norms."""
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, sae, _ = load_and_format_sae("saeflow", adapt(folder, MODEL), "cpu")
    return sae.to(device="cpu", dtype=torch.float32)


class Tokens:
    """Gives out the same tokens each time, in place of SAELens's store of a data set."""

    def __init__(self, tokens):
        self.tokens, (self.store_batch_size_prompts, self.context_size) = tokens, tokens.shape

    def get_batch_tokens(self, n):
        return self.tokens[:n]

    def reset_input_dataset(self):
        pass


def core(job):
    """Metrics and metrics by latent of `run_evals`, and what it measured them on."""
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_bench.evals.core.main import (
        calculate_misc_metrics,
        run_evals,
        save_single_eval_result,
    )

    folder, lm = Path(job["folder"]), model()
    tokens = torch.randint(0, 50, (24, 16), generator=torch.Generator().manual_seed(0))
    _, cache = lm.run_with_cache(tokens)
    save_file({"x": cache[HOOK].contiguous()}, folder / "x.safetensors")
    found = {}
    for name, path in job["saes"].items():
        sae = taken(path)
        config = CoreEvalConfig(
            model_name=MODEL, batch_size_prompts=24, n_eval_reconstruction_batches=1,
            n_eval_sparsity_variance_batches=1, context_size=16, compute_kl=True, compute_ce_loss=True,
            compute_l2_norms=True, compute_sparsity_metrics=True, compute_variance_metrics=True,
            compute_featurewise_density_statistics=True, compute_featurewise_weight_based_metrics=True,
        )  # fmt: skip
        metrics, by_latent = run_evals(sae, Tokens(tokens), lm, config)
        metrics["misc_metrics"] = calculate_misc_metrics(by_latent)
        own = adapt(path, MODEL)._sae[0]
        spliced = lm.run_with_hooks(
            tokens, return_type="loss", fwd_hooks=[(HOOK, lambda x, hook, own=own: own(x))]
        )
        result = {"eval_cfg": config, "metrics": metrics, "feature_metrics": by_latent}
        saved = folder / f"{name}.json"
        save_single_eval_result(
            result | {"sae_id": name, "sae_set": "saeflow"}, "id", "6", "0", str(saved), sae
        )
        found[name] = {
            "metrics": metrics, "by_latent": by_latent, "loss_by_saeflow": spliced.item(),
            "config": json.loads(saved.read_text())["sae_cfg_dict"],
        }  # fmt: skip
    return found


def sparse_probing(job):
    """Accuracies of `run_eval_single_dataset` on activations that are there, and its latents' means."""
    import jaxtyping
    from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
    from sae_bench.evals.sparse_probing.main import run_eval_single_dataset
    from sae_bench.sae_bench_utils.activation_collection import get_sae_meaned_activations

    folder = Path(job["folder"])
    held = load_file(folder / "x.safetensors")
    acts = {
        split: {name: held[f"{split}.{name}"] for name in ("a", "b")} for split in ("train", "test")
    }
    torch.save({**acts, "llm_results": {}}, folder / "planted_activations.pt")
    found = {}
    for name, path in job["saes"].items():
        sae = taken(path)
        means = get_sae_meaned_activations(dict(acts["test"]), sae, 7)
        save_file({k: v.contiguous() for k, v in means.items()}, folder / f"{name}.safetensors")
        config = SparseProbingEvalConfig(model_name=MODEL, k_values=job["k"], sae_batch_size=7)
        # SAEBench's probes name two sizes alike, which newer jaxtyping refuses, whatever the SAE.
        jaxtyping.config.update("jaxtyping_disable", True)
        found[name], _ = run_eval_single_dataset(
            "planted", config, sae, None, 1, HOOK, "cpu", str(folder), False
        )
        jaxtyping.config.update("jaxtyping_disable", False)
    return found


def probes(job):
    """Return what `run_sae_eval` of sae_probes writes on one of its data sets, with activations that give its labels away."""
    from sae_probes.run_sae_evals import run_sae_eval
    from sae_probes.utils_data import get_numbered_binary_tags, get_xy_traintest, get_yvals

    folder = Path(job["folder"])
    dataset = min(get_numbered_binary_tags(), key=lambda name: len(get_yvals(name)))
    y = torch.tensor(get_yvals(dataset))
    x = torch.randn(len(y), D_IN, generator=torch.Generator().manual_seed(0))
    x[:, 0] += 2.0 * y
    path = folder / f"model_activations_{MODEL}" / f"{dataset}_{HOOK}.pt"
    path.parent.mkdir()
    torch.save(x, path)
    sizes = min(len(y) - 100, 1024)
    parts = get_xy_traintest(sizes, dataset, HOOK, MODEL, folder)
    names = ("x_train", "y_train", "x_test", "y_test")
    save_file(
        {n: torch.as_tensor(p).contiguous() for n, p in zip(names, parts, strict=True)},
        folder / "split.safetensors",
    )
    found = {}
    for name, sae in job["saes"].items():
        results = folder / name
        run_sae_eval(
            taken(sae), dataset, HOOK, "l2", "normal", MODEL, folder, device="cpu", ks=job["k"],
            results_path=results, mean_diff_normalization="none",
        )  # fmt: skip
        (written,) = results.rglob("*.json")
        found[name] = json.loads(written.read_text())
    return found


class Words:
    """Answers prompts with the activation of the word that they ask about, in place of a model."""

    def __init__(self, words, x):
        self.x = dict(zip(words, x, strict=True))
        self.tokenizer = self

    def to_tokens(self, prompt):
        return torch.zeros(1, 1)

    def run_with_cache(self, prompts, names_filter):
        asked = [prompt.rpartition("\n")[2].partition(":")[0] for prompt in prompts]
        return None, {names_filter[0]: torch.stack([self.x[word] for word in asked])[:, None]}


def absorption(job):
    """The steps of SAEBench's evaluation between activations of words and its results, and its results by letter."""
    import random

    from sae_bench.evals.absorption import feature_absorption as last
    from sae_bench.evals.absorption import k_sparse_probing as first
    from sae_bench.evals.absorption.main import _aggregate_results_df
    from sae_bench.evals.absorption.probing import train_multi_probe

    random.seed(0)
    torch.manual_seed(0)
    folder, most = Path(job["folder"]), job["max_k"]
    held, sae = load_file(folder / "words.safetensors"), taken(job["saes"]["letters"])
    labels = {
        split: [
            (f"{first.LETTERS[letter]}{split}{i}", letter)
            for i, letter in enumerate(held[f"{split}.letters"].tolist())
        ]
        for split in ("train", "test")
    }
    x, y = held["train.x"], torch.nn.functional.one_hot(held["train.letters"])
    probe = train_multi_probe(
        x, y, batch_size=64, num_epochs=50, lr=1e-2, weight_decay=1e-4, show_progress=False, device="cpu"
    )  # fmt: skip
    # Smaller batches than its 4096: with so few words and latents, the random start would decide.
    sparse = first.train_k_sparse_probes(
        sae, labels["train"], x, range(1, most + 1), batch_size=256
    )
    raw = first.eval_probe_and_sae_k_sparse_raw_scores(
        sae, probe, sparse, labels["test"], held["test.x"]
    )
    raw.to_parquet(folder / first.get_sparse_probing_raw_results_filename("letters", 1))
    about = first.sae_k_sparse_metadata(sae, probe, sparse, "letters", 1)
    metrics = first.build_metrics_df(raw, about, most)
    first.add_feature_splits_to_metrics_df(metrics, most, 0.03)
    words = [word for word, _ in labels["test"]]
    calculator = last.FeatureAbsorptionCalculator(
        Words(words, held["test.x"]), words, max_icl_examples=3, word_token_pos=-1, topk_feats=2
    )
    told = last.get_stats_and_likely_false_negative_tokens(metrics, "letters", 1, folder)
    found = last.calculate_projection_and_cos_sims(calculator, sae, probe, 1, told)
    lines = _aggregate_results_df(found).merge(metrics[["letter", "f1_probe"]])
    # One letter's words as they are, with a probe and latents that are given.
    given = calculator.calculate_absorption(sae, words, held["probe"], job["own"], 1, False)
    return {
        "letters": json.loads(lines.to_json(orient="records")),
        "words": [[one.absorption_fraction, one.is_full_absorption] for one in given.word_results],
    }


def main(jobs):
    for job in jobs:
        with contextlib.redirect_stdout(sys.stderr):
            found = globals()[job["do"]](job)
        (Path(job["folder"]) / "found.json").write_text(json.dumps(found))


main(json.loads(Path(sys.argv[1]).read_text()))

"""Let SAELens draw, save and sample synthetic worlds, and train SAEs on one: `python synthetic_worlds.py JOBS`.

JOBS is a JSON list of {do, folder, ...}: `world` saves a world of a config and rows of it, with its features' coefficients; `laws`
writes what its deterministic functions give; `train` trains SAEs on a saved world and leaves what SynthSAEBench publishes of one.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def world(folder, config, rows):
    from sae_lens.synthetic import SyntheticModel, SyntheticModelConfig

    model = SyntheticModel(SyntheticModelConfig.from_dict(config))
    model.save(folder)
    model = SyntheticModel.load_from_disk(folder)
    torch.manual_seed(1)
    x, latents = model.sample_with_features(rows)
    generator = model.activation_generator
    drawn = {"x": x, "latents": latents, "means": generator.mean_firing_magnitudes}
    drawn |= {"stds": generator.std_firing_magnitudes}
    save_file({name: part.contiguous() for name, part in drawn.items()}, f"{folder}/drawn.safetensors")  # fmt: skip


def laws(folder, hierarchy, firing, n, steps, lr):
    from sae_lens.synthetic import HierarchyConfig, generate_hierarchy, zipfian_firing_probabilities
    from sae_lens.synthetic.feature_dictionary import orthogonalize_embeddings

    features = load_file(f"{folder}/features.safetensors")["features"]
    probabilities = zipfian_firing_probabilities(n, **firing)
    forest = generate_hierarchy(n, HierarchyConfig.from_dict(hierarchy), seed=0)
    parents = torch.full((n,), -1)
    waiting = list(forest.roots)
    while waiting:
        node = waiting.pop()
        assert node.mutually_exclusive_children == bool(node.children)
        for child in node.children:
            parents[child.feature_index] = node.feature_index
            waiting.append(child)
    factors = forest.compute_probability_correction_factors(probabilities)
    found = {
        "probabilities": probabilities, "parents": parents, "compensated": (probabilities * factors).clamp(max=1),
        "features": orthogonalize_embeddings(features, num_steps=steps, lr=lr, chunk_size=16),
    }  # fmt: skip
    save_file(found, f"{folder}/laws.safetensors")


def train(folder, world, d_in, d_sae, samples):
    from sae_lens import (
        BatchTopKTrainingSAEConfig,
        JumpReLUTrainingSAEConfig,
        LoggingConfig,
        MatchingPursuitTrainingSAEConfig,
        MatryoshkaBatchTopKTrainingSAEConfig,
        StandardTrainingSAEConfig,
    )  # fmt: skip
    from sae_lens.synthetic import SyntheticSAERunner, SyntheticSAERunnerConfig

    size = {"d_in": d_in, "d_sae": d_sae}
    pursuit = {"residual_threshold": 0, "max_iterations": 4, "stop_on_duplicate_support": False}
    configs = {
        "btk": BatchTopKTrainingSAEConfig(**size, k=4),
        "mat": MatryoshkaBatchTopKTrainingSAEConfig(**size, k=4, matryoshka_widths=[d_sae // 4]),
        "mp": MatchingPursuitTrainingSAEConfig(**size, decoder_init_norm=1.0, **pursuit),
        "standard": StandardTrainingSAEConfig(**size, l1_coefficient=0.5),
        "jumprelu": JumpReLUTrainingSAEConfig(
            **size, l0_coefficient=0.1, normalize_activations="expected_average_only_in"
        ),
    }
    for name, config in configs.items():
        runner = SyntheticSAERunner(
            SyntheticSAERunnerConfig(
                synthetic_model=world, sae=config, training_samples=samples, batch_size=256, lr=3e-3, eval_samples=20_000,
                output_path=f"{folder}/{name}", n_batches_for_norm_estimate=4, logger=LoggingConfig(log_to_wandb=False),
            )
        )  # fmt: skip
        runner.run()
        from sae_lens import SAE

        sae = SAE.load_from_disk(f"{folder}/{name}")
        x = runner.synthetic_model.sample(64)
        with torch.no_grad():
            latents = sae.encode(x)
            expected = {"x": x, "latents": latents, "x_hat": sae.decode(latents)}
        save_file({key: part.detach().contiguous() for key, part in expected.items()}, f"{folder}/{name}.safetensors")  # fmt: skip


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        {"world": world, "laws": laws, "train": train}[job.pop("do")](**job)

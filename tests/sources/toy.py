"""A family that no release of transformers has, with its own names of everything."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class ToyConfig(PreTrainedConfig):
    """Sizes of a toy."""

    model_type = "saeflow_toy"

    def __init__(self, depth: int = 3, width: int = 16, vocab_size: int = 320, **rest: Any) -> None:
        self.depth, self.width, self.vocab_size = depth, width, vocab_size
        super().__init__(**rest)


class Look(nn.Module):
    """Attention of one head; gives its values and its keys."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, stream: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.mix(stream)[:, None].chunk(3, -1)
        return self.out(scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]), k


class Stage(nn.Module):
    """A block that halves what attention gives."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.look = nn.LayerNorm(width), Look(width)
        self.then, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 32),
            nn.Linear(32, width),
        )

    def forward(self, *, stream: Tensor) -> tuple[str, Tensor]:
        seen, _ = self.look(self.before(stream))
        stream = stream + 0.5 * seen
        return "a stage", self.down(gelu(self.up(self.then(stream)))) + stream


class ToyBase(PreTrainedModel):
    """Without a head."""

    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.stages = nn.ModuleList(Stage(config.width) for _ in range(config.depth))
        self.last = nn.LayerNorm(config.width)
        self.post_init()

    def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutputWithPast:
        stream = self.words(input_ids)
        for stage in self.stages:
            _, stream = stage(stream=stream)
        return BaseModelOutputWithPast(last_hidden_state=self.last(stream))


class Toy(PreTrainedModel):
    """With a head that scales."""

    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.trunk = ToyBase(config)
        self.scores = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.scores

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(
            logits=3 * self.scores(self.trunk(input_ids).last_hidden_state)
        )


def toy() -> Any:
    """A registered toy with random weights."""
    AutoConfig.register("saeflow_toy", ToyConfig, exist_ok=True)
    AutoModelForCausalLM.register(ToyConfig, Toy, exist_ok=True)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(ToyConfig()).eval().requires_grad_(False)

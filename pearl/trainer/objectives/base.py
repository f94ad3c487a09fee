"""What an objective is: which views of a trajectory it needs, and the loss terms on their states.

The first half (`Objective`) is plain data and runs in data workers; the second (`Losses`) is a module with what the
objective learns beside the model. An objective is one file with both; `pearl.objectives` is its entry-point group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from pearl.trainer.conversation import Conversation
from pearl.trainer.packing import Batch, Example
from pearl.trainer.views import ImageInputs, ViewEncoder


@dataclass(frozen=True)
class Objective(ABC):
    """Settings of an objective; its fields are options of the command line.

    Attributes:
        special_tokens: What it adds to the vocabulary.
        latent_token: The one of them at which latents stand.
        needs_grids: Whether it places boxes on images' visual tokens; where these lie is known of the known families.
        step_words, step_images: Whether its views show what was said in the steps, and their images: by these,
            trajectories that are about as long are batched together.
    """

    name: ClassVar[str]
    special_tokens: ClassVar[tuple[str, ...]] = ()
    latent_token: ClassVar[str | None] = None
    needs_grids: ClassVar[bool] = False
    step_words: ClassVar[bool] = True
    step_images: ClassVar[bool] = True

    @property
    def least_batch(self) -> int:
        """More than 1 where it compares the trajectories of a forward with each other."""
        return 1

    @abstractmethod
    def example(self, conversation: Conversation, images: Sequence[ImageInputs], encoder: ViewEncoder) -> Example:
        """The views that it needs of one trajectory; the first one is the trunk.

        Raises:
            ViewError: the trajectory cannot be used, and why.
        """

    @abstractmethod
    def losses(self, hidden_size: int) -> Losses:
        """The module that computes its terms."""


class Losses(nn.Module, ABC):
    """An objective's loss terms, and what it learns beside the model.

    Attributes:
        weights: Of each term in the loss.
        predictors: Embeddings (K, H) of predictor tokens, where it has them.
        recurrent: Whether each latent token is fed with the state before it, not with an image's visual tokens.
        watched: Of the last forward, the embeddings (N, H) that are to meet, predicted and target, if any: what is
            watched for collapse.
    """

    weights: Mapping[str, float]
    predictors: nn.Parameter | None
    recurrent: bool = False
    watched: tuple[Tensor, Tensor] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("predictors", None)

    @abstractmethod
    def counts(self, batch: Batch) -> dict[str, int]:
        """Over how many tokens or trajectories each term is a mean."""

    @abstractmethod
    def forward(self, states: States) -> dict[str, Tensor]:
        """The sum of each term over what `counts` counts."""


@dataclass(frozen=True)
class States:
    """The model's final-layer, post-norm states of a batch, and what it was fed.

    Attributes:
        main: (R·T, H) of the rows that are learned from.
        targets: (R·T', H) of the target views, without gradients; empty when there are none.
        fed: (R·T, H) the input embeddings of `main`.
        latents: (L, H) what was fed at its latent tokens.
        head: Logits (…, vocabulary) of states.
    """

    batch: Batch
    main: Tensor
    targets: Tensor
    fed: Tensor
    latents: Tensor
    head: nn.Module

    def of(self, view: str, tokens: Tensor) -> Tensor:
        """States (N, H) of a learned view's tokens (N,)."""
        return self.main[self.batch.places[view].at[tokens]]

    def inputs(self, view: str, tokens: Tensor) -> Tensor:
        """Input embeddings (N, H) of a learned view's tokens (N,)."""
        return self.fed[self.batch.places[view].at[tokens]]

    def target(self, view: str, tokens: Tensor) -> Tensor:
        """States (N, H) of a target view's tokens (N,); they have no gradients."""
        return self.targets[self.batch.places[view].at[tokens]].detach()

    def frozen_head(self, states: Tensor) -> Tensor:
        """The same as `head`, without gradients to it."""
        # With the module's own weights, which DeepSpeed's hooks gather: copies without gradients it would not know.
        trained = [parameter for parameter in self.head.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        logits: Tensor = self.head(states)
        for parameter in trained:
            parameter.requires_grad_(True)
        return logits

    def next_token(self, view: str) -> Tensor:
        """The summed cross-entropy of a view's supervised tokens."""
        places = self.batch.places[view]
        logits = self.head(self.of(view, places.supervised - 1))
        return F.cross_entropy(logits.float(), places.ids[places.supervised], reduction="sum")

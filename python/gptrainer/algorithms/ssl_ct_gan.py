"""The semi-supervised CT-GAN: a classifier of K classes whose log-sum-exp is the critic's score."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gpkernels
from gpkernels.arguments import UserError
from gptrainer.algorithms.system import Metrics, System
from gptrainer.data import ShuffledBatches, load_images
from gptrainer.models import sample
from gptrainer.models.semi_supervised import Classifier
from gptrainer.processes import Draws
from gptrainer.systems import SemiSupervisedConfig

INITIAL = 500  # images for the initialisation of the classifier that depends on data


class SemiSupervisedLoss(nn.Module):
    """Cross-entropy on labelled images, plus half of the adversarial and consistency losses on the others (Wei et al.
    2018, section 3.3, as their code trains).

    A score is lse, the log of the sum of exp(logits) (Salimans et al. 2016, section 5): real if it is large.
    """

    def __init__(self, classifier: nn.Module, consistency_weight: float) -> None:
        super().__init__()
        self.classifier = classifier
        self.consistency_weight = consistency_weight

    def forward(self, images: Tensor, labels: Tensor, unlabelled: Tensor, fake: Tensor) -> Metrics:
        """Compute the losses. images, unlabelled, fake: (N, C, H, W), each of its own N; labels: (N,)."""
        labelled = F.cross_entropy(self.classifier(images), labels)
        first, again, generated = (self.classifier(x) for x in (unlabelled, unlabelled, fake))
        adversarial = gpkernels.gan_discriminator_loss(first.logsumexp(1), generated.logsumexp(1))
        # The op sums over classes where the code takes the mean.
        consistency = gpkernels.consistency_term(first.softmax(1), again.softmax(1)) / first.shape[1]
        parts = {"adversarial": adversarial, "labelled_loss": labelled, "consistency": consistency}
        loss = labelled + 0.5 * (self.consistency_weight * consistency + adversarial)
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}


class SemiSupervisedCTGAN(System):
    """The classifier learns from few labels and all images, the generator by matching the mean of its last features
    (Salimans et al. 2016, section 3.1)."""

    config: SemiSupervisedConfig

    def __init__(self, config: SemiSupervisedConfig, generator: nn.Module, critic: nn.Module, draws: Draws) -> None:
        if not isinstance(critic, Classifier):
            raise UserError(f"--network: expected semi-supervised for {config.algorithm}, got {config.network}")
        super().__init__(config, generator, critic, draws)
        options: dict[str, Any] = {"data_dir": config.data_dir, "limit": config.limit}
        self.train = load_images(config.data, **options)
        self.held_out = load_images(config.data, split="held-out", **options)
        chosen = few_of_each_class(cast(Tensor, self.train.labels), config.labels_per_class, config.seed)
        self.labelled = ShuffledBatches(chosen, min(config.batch_size, len(chosen)), config.seed)
        self.stateful["labelled"] = self.labelled
        critic.initialise(self.train[torch.arange(min(INITIAL, len(self.train)))].to(draws.device))

    def build_critic_loss(self, critic: nn.Module) -> nn.Module:
        return SemiSupervisedLoss(critic, self.config.consistency_weight)

    def labelled_batch(self) -> tuple[Tensor, Tensor]:
        """Draw labelled images, (n, C, H, W), and their labels, (n,)."""
        batch = self.train.subset(self.labelled.next())
        return batch.images.to(self.draws.device), cast(Tensor, batch.labels).to(self.draws.device)

    def critic_parts(self, real: Tensor, fake: Tensor) -> Metrics:
        images, labels = (self.processes.rows(x) for x in self.labelled_batch())
        parts: Metrics = self.critic_loss(images, labels, real, fake)
        return parts

    def loss_of_generated(self, fake: Tensor, real: Tensor) -> Tensor:
        critic: Any = self.critic
        real_mean, fake_mean = (critic.with_features(x)[1].mean(0) for x in (real, fake))
        both = self.processes.mean(torch.stack([real_mean, fake_mean]))
        return (both[0] - both[1]).square().mean()

    def scores(self, x: Tensor) -> Tensor:
        return self.critic(x).logsumexp(1)

    def measure(self, critic: nn.Module) -> dict[str, float]:
        logits = sample(critic, self.held_out.images.to(self.draws.device)).cpu()
        return {"held_out_error": logits.argmax(1).ne(cast(Tensor, self.held_out.labels)).double().mean().item()}


def few_of_each_class(labels: Tensor, count: int, seed: int) -> Tensor:
    """Draw indices of ``count`` images of each class; UserError where a class has fewer."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    of_class = [shuffled[labels[shuffled] == label] for label in labels.unique()]
    fewest = min(map(len, of_class))
    if count > fewest:
        expected = f"at most {fewest}, the size of the smallest class"
        raise UserError(f"--labels-per-class: expected {expected}, got {count}")
    return torch.cat([indices[:count] for indices in of_class])

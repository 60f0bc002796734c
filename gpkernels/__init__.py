"""Exact gradient penalties in PyTorch for any critic: WGAN-GP, R1, R2, DRAGAN, CT-GAN's consistency term, eikonal."""

from gpkernels import optim
from gpkernels import registration as registration  # ties the ops to their kernels
from gpkernels.approximate import approximate_r1_penalty
from gpkernels.backends import backend, set_backend
from gpkernels.critic.compiled import compile_passes, set_compile_passes
from gpkernels.critic.double_backward import fast_double_backward
from gpkernels.critic.explain import explain
from gpkernels.critic.parts import CriticLossParts
from gpkernels.gradients import input_gradient, value_and_input_gradient
from gpkernels.losses import CriticLoss
from gpkernels.ops.consistency import consistency_term, lipschitz_consistency
from gpkernels.ops.gradient_norm_penalty import gradient_norm_penalty
from gpkernels.ops.grid_sample import grid_sample
from gpkernels.ops.instance_noise import add_instance_noise
from gpkernels.ops.interpolate import interpolate
from gpkernels.ops.relativistic_loss import relativistic_critic_loss, relativistic_generator_loss
from gpkernels.ops.scaled_dot_product_attention import scaled_dot_product_attention
from gpkernels.ops.score_loss import (
    gan_discriminator_loss,
    hinge_critic_loss,
    least_squares_critic_loss,
    least_squares_generator_loss,
    nonsaturating_generator_loss,
    saturating_generator_loss,
    wgan_critic_loss,
    wgan_generator_loss,
)
from gpkernels.ops.weights import clip_weights_
from gpkernels.penalties import dragan_penalty, eikonal_loss, gradient_penalty, r1_penalty, r2_penalty
from gpkernels.version import __version__

__all__ = [
    "CriticLoss",
    "CriticLossParts",
    "__version__",
    "add_instance_noise",
    "approximate_r1_penalty",
    "backend",
    "clip_weights_",
    "compile_passes",
    "consistency_term",
    "dragan_penalty",
    "eikonal_loss",
    "explain",
    "fast_double_backward",
    "gan_discriminator_loss",
    "gradient_norm_penalty",
    "gradient_penalty",
    "grid_sample",
    "hinge_critic_loss",
    "input_gradient",
    "interpolate",
    "least_squares_critic_loss",
    "least_squares_generator_loss",
    "lipschitz_consistency",
    "nonsaturating_generator_loss",
    "optim",
    "r1_penalty",
    "r2_penalty",
    "relativistic_critic_loss",
    "relativistic_generator_loss",
    "saturating_generator_loss",
    "scaled_dot_product_attention",
    "set_backend",
    "set_compile_passes",
    "value_and_input_gradient",
    "wgan_critic_loss",
    "wgan_generator_loss",
]

"""Settings of DAPO: sizes, sampling, loss, dynamic sampling, steered members."""

from dataclasses import dataclass

from qscope_jax.errors import ConfigError
from qscope_jax.models.sampling import SamplingConfig
from qscope_jax.training.dapo.advantages import SCALES
from qscope_jax.training.dapo.policy_loss import PolicyLossConfig
from qscope_jax.training.tuning import TuningConfig


@dataclass(frozen=True, kw_only=True)
class DAPOConfig(TuningConfig):
    """Sizes and rates of a run; options have TRL's names where it has them."""

    num_prompts: int = 8
    """Prompts of a step."""
    num_generations: int = 8
    """Answers to a prompt: the group G, steered members included."""
    num_iterations: int = 1
    """Times that a step's rollouts are gone through."""
    num_mini_batches: int = 1
    """Updates in which they are gone through each time."""
    max_prompt_length: int = 256
    """Room for a prompt, in tokens."""
    max_completion_length: int = 256
    """Tokens of an answer at most, its stop token included."""
    temperature: float = 1.0
    """Of the draws; log-probabilities are taken at it, too."""
    top_p: float = 1.0
    """Draw from the most probable tokens that together reach this probability."""
    top_k: int = 0
    """Draw from so many most probable tokens; 0 is all."""
    rollout_rows: int = 0
    """Rollouts under way at a time; 0 is all of a generation batch."""
    loss_type: str = "dapo"
    """Mean over tokens of the step (`dapo`), over answers (`grpo`), or sum by length (`dr_grpo`); see `PolicyLossConfig`."""
    epsilon: float = 0.2
    """Lower clip."""
    epsilon_high: float = 0.28
    """Upper clip."""
    delta: float | None = None
    """Dual clip."""
    importance_sampling_level: str = "token"
    """`token` or `sequence`."""
    beta: float = 0.0
    """Weight of the divergence from the model that the run began with; 0 keeps no such model."""
    scale_rewards: str = "group"
    """What advantages are divided by: std of the `group`, of the `batch`, or `none`."""
    advantage_eps: float = 1e-6
    """Added to it."""
    mask_truncated_completions: bool = False
    """Leave answers that were cut out of the loss; steered ones stay."""
    dynamic_sampling: bool = False
    """Replace prompts whose answers are all right or all wrong by further ones."""
    filter_metric: str = ""
    """Reward that says which answers are right, by default the first; the bare outcome of the task, not a shaped one."""
    gen_batch_size: int = 0
    """Prompts drawn at a time; 0 is num_prompts."""
    max_num_gen_batches: int = 10
    """Batches drawn at most for a step; with fewer groups than wanted it goes on with those that there are, and says so."""
    strict_groups: bool = False
    """End the run instead."""
    num_steered: int = 0
    """Members of each group that are sampled under the run's edits: the last ones."""
    max_steered_tokens: int = 0
    """Tokens of a steered answer that are learnt from, from its first on; it is scored as a whole. 0 is all."""
    min_entropy: float = 0.0
    """End the run, saved and evaluated, where the mean entropy of a step's tokens (nats) is below; 0 never does."""
    max_entropy: float = 0.0
    """The same where it is above; 0 never does. Under clip-higher entropy may grow before it collapses."""
    eval_samples: int = 4
    """Answers to each held-out prompt."""

    def __post_init__(self):
        """Check ranges."""
        super().__post_init__()
        for name in (
            "num_prompts",
            "num_iterations",
            "num_mini_batches",
            "max_prompt_length",
            "max_completion_length",
            "max_num_gen_batches",
            "eval_samples",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.num_generations < 2:
            raise ConfigError(f"num_generations is {self.num_generations}, expected at least 2: answers are compared with others to the same prompt")
        if not 0 <= self.num_steered < self.num_generations:
            raise ConfigError(f"num_steered is {self.num_steered}, expected 0 to below num_generations = {self.num_generations}")
        if self.dynamic_sampling and self.num_generations - self.num_steered < 2:
            raise ConfigError(
                "dynamic_sampling looks at members that are not steered and needs two of them; lower num_steered or raise num_generations"
            )
        if not self.temperature > 0:
            raise ConfigError(f"temperature is {self.temperature}, expected a positive number: greedy answers to a prompt are all the same")
        if self.scale_rewards not in SCALES:
            raise ConfigError(f"scale_rewards is {self.scale_rewards}, expected one of {', '.join(SCALES)}")
        if self.max_steered_tokens < 0:
            raise ConfigError(f"max_steered_tokens is {self.max_steered_tokens}, expected 0 or more")
        if self.min_entropy < 0 or self.max_entropy < 0 or (self.max_entropy and self.min_entropy >= self.max_entropy):
            raise ConfigError(f"min_entropy is {self.min_entropy} and max_entropy {self.max_entropy}, expected 0 or more, the first below the second")
        if self.gen_batch_size < 0 or self.rollout_rows < 0:
            raise ConfigError(f"gen_batch_size is {self.gen_batch_size} and rollout_rows {self.rollout_rows}, expected 0 or more")
        if self.num_rows % self.num_mini_batches:
            raise ConfigError(
                f"{self.num_rows} answers of a step cannot be split into {self.num_mini_batches} mini-batches; expected a multiple of them"
            )
        self.policy_loss()

    @property
    def num_rows(self) -> int:
        """Answers of a step."""
        return self.num_prompts * self.num_generations

    @property
    def drawn_prompts(self) -> int:
        """Prompts of a generation batch."""
        return self.gen_batch_size or self.num_prompts

    @property
    def steered_members(self) -> tuple[int, ...]:
        """Their numbers in each group."""
        return tuple(range(self.num_generations - self.num_steered, self.num_generations))

    @property
    def updates(self) -> int:
        """Optimiser steps of the run."""
        return self.steps * self.num_iterations * self.num_mini_batches

    def policy_loss(self) -> PolicyLossConfig:
        """Clipping and aggregation."""
        return PolicyLossConfig(self.loss_type, self.epsilon, self.epsilon_high, self.delta, self.importance_sampling_level, self.beta)

    def sampling(self) -> SamplingConfig:
        """How rollouts are drawn."""
        return SamplingConfig(self.max_completion_length, self.temperature, self.top_k, self.top_p, seed=self.seed)

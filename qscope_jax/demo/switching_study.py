"""Fine-tuning the embedded model on conversations in which a few answers switch language: arms that differ in their auxiliary loss alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from qscope_jax.data.chat_data import Message
from qscope_jax.data.chat_templates import ChatFormat
from qscope_jax.data.chat_tokens import ChatRows, chat_rows, prompt_text
from qscope_jax.demo.corpus import LANGUAGES, sentences
from qscope_jax.demo.switching import clean_conversations, questions, switching_conversations
from qscope_jax.errors import InputError
from qscope_jax.features.switching.code_switching import Response, is_switched, sample_responses, script_tokens, target_script
from qscope_jax.features.switching.find_language_features import find_language_features
from qscope_jax.features.switching.language_corpus import CorpusConfig
from qscope_jax.features.switching.language_features import LanguageFeatures
from qscope_jax.features.switching.switch_prompts import SwitchPrompt
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.models.sampling import SamplingConfig
from qscope_jax.sae.layer_sae import LayerSAE
from qscope_jax.training.auxiliary import Auxiliary
from qscope_jax.training.sasft import SASFTConfig, feature_ceiling, script_penalty
from qscope_jax.training.sft import SFT, SFTConfig

ARMS = ("sft", "sasft", "penalty", "random")
"""Cross-entropy alone; with the language's features held down; with its tokens' probability held down; with features of no language held down."""
FORMAT = ChatFormat(template="plain")


@dataclass(frozen=True)
class Study:
    """Sizes of a study."""

    training: SFTConfig = field(
        default_factory=lambda: SFTConfig(steps=120, batch_size=16, length=128, learning_rate=1e-3, warmup_steps=10, remat=False)
    )
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_new_tokens=64, temperature=1.0, top_p=0.8))
    """As the papers have it, but for the length."""
    conversations: int = 3000
    clean: int = 240
    """Held-out conversations without a switch, for the loss on clean text."""
    questions: int = 60
    samples: int = 8
    """Answers to a question."""


@dataclass(frozen=True)
class ArmResult:
    """What one arm came to.

    Attributes:
        answers: Answers to the held-out questions.
        loss: Cross-entropy on clean held-out conversations, nats a token of their answers.
    """

    answers: list[Response]
    loss: float

    def switched(self, target: str) -> list[int]:
        """Switched answers to each question."""
        script, found = target_script(target), [0] * (max(one.prompt for one in self.answers) + 1)
        for one in self.answers:
            found[one.prompt] += is_switched(one.text, script)
        return found


def run_arm(model: LanguageModel, target: str, auxiliary: Auxiliary | None, study: Study, seed: int = 0) -> ArmResult:
    """Fine-tune, ask, and measure the loss on clean text; equal seeds have equal conversations, order of batches and draws.

    Raises:
        InputError: another target than those of `switching.TARGETS`.
    """
    rows = _rows(model, switching_conversations(study.conversations, target, seed=seed), study)
    recipe = SFT(model, rows, replace(study.training, seed=seed), auxiliary=auxiliary, languages=tuple(LANGUAGES),
                 held_out=_rows(model, clean_conversations(study.clean), study))  # fmt: skip
    state, stream = recipe.init(), recipe.stream()
    for _ in range(study.training.steps):
        state, _ = recipe.step(state, next(stream))
    loss = float(recipe.evaluate(state)["loss"])
    return ArmResult(ask(recipe.tuning.tuned(state), target, study, seed), loss)


def ask(model: LanguageModel, target: str, study: Study, seed: int = 0) -> list[Response]:
    """Answers to held-out questions in the five other languages; all arms and seeds are asked the same."""
    prompts = [SwitchPrompt((("user", text),), language) for text, language in questions(target, study.questions)]

    def render(prompt: SwitchPrompt) -> str:
        return prompt_text([Message(*turn) for turn in prompt.messages], model.tokenizer, FORMAT)

    return sample_responses(model, prompts, replace(study.sampling, seed=seed), samples=study.samples, render=render, batch_size=128)


FEATURES = 16
"""Of each layer. The papers hold two down, of 16,000 and more; the embedded model's dictionaries have 768, over which a language is spread."""


def target_features(
    model: LanguageModel, saes: Sequence[LayerSAE], target: str, random_seed: int | None = None, count: int = FEATURES
) -> LanguageFeatures:
    """Features of the target at each layer of `saes` and their levels on the six languages, from the corpus' training sentences.

    With a `random_seed` as many that belong to no language.
    """
    texts = {code: sentences(code) for code in LANGUAGES}
    return find_language_features(model, saes, texts, target, count=count, random_seed=random_seed, config=CorpusConfig(min_tokens=500))


def auxiliary_of(arm: str, model: LanguageModel, target: str, weight: float, features: LanguageFeatures | None = None) -> Auxiliary | None:
    """The loss that an arm adds.

    Args:
        arm: One of `ARMS`.
        model: The model.
        target: The unwanted language.
        weight: Lambda.
        features: What `sasft` and `random` hold down.

    Raises:
        InputError: another arm, or no features where they are needed.
    """
    if arm not in ARMS:
        raise InputError(f"arm {arm!r} is not one of {', '.join(ARMS)}")
    if arm == "sft":
        return None
    if arm == "penalty":
        unwanted_V = script_tokens(model.tokenizer, model.config.vocab_size, target_script(target))
        return script_penalty(unwanted_V, tuple(LANGUAGES), target, weight)
    if features is None:
        raise InputError(f"arm {arm} holds features down; give them")
    return feature_ceiling(features, SASFTConfig(weight=weight))


def _rows(model: LanguageModel, conversations: list, study: Study) -> ChatRows:
    return chat_rows(conversations, model.tokenizer, FORMAT, length=study.training.length)

"""Directional ablation before a switch: how much less often a model switches when a feature's direction is taken from its last state.

    x' = x - lambda d        after a layer, at the token right before the first switched one (Qwen-Scope report, Eq. 25)

The model has read the prompt and the answer up to the switch; what it would write next is read from its scores, without sampling noise, and,
if wanted, drawn anew. The papers find fewer switches the larger lambda is for the language's own feature, and no fewer for that of English.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.data.batches import TokenBatch, pad_batch
from qscope_jax.data.buckets import bucket_length
from qscope_jax.errors import InputError, ShapeError
from qscope_jax.features.generation.local_generator import stable_seed
from qscope_jax.features.proportions import clustered_mean
from qscope_jax.features.steering import UNITS, add_directions
from qscope_jax.features.switching.code_switching import SAMPLING, is_switched, script_tokens
from qscope_jax.features.switching.switch_points import SwitchPoint
from qscope_jax.models.edits import AddDirections
from qscope_jax.models.generation import decode, prefill
from qscope_jax.models.language_model import LanguageModel, forward
from qscope_jax.models.sampling import Sampler, SamplingConfig, keep_probable

Measure = Literal["probability", "drawn", "observed", "resampled"]

MEASURES: dict[Measure, str] = {
    "probability": "probability of the script's tokens",
    "drawn": "the same with temperature and top_p",
    "observed": "probability of the token that was drawn",
    "resampled": "share of new continuations that switch",
}
"""What is measured, in words."""


@dataclass(frozen=True)
class AblationConfig:
    """How a sweep runs.

    Attributes:
        doses: Values of lambda; 0 leaves the model as it is, and a negative one adds the direction.
        unit: `raw`: lambda multiplies the direction as given. `residual`: it is in multiples of the median norm of the states that are changed.
        sampling: How answers are drawn: what `drawn` takes into account, and `resampled` draws with.
        draws: New continuations of each answer at each dose; 0 draws none.
        draw_tokens: Tokens of each.
        batch_size: Answers at a time.
    """

    doses: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
    unit: str = "raw"
    sampling: SamplingConfig = SAMPLING
    draws: int = 0
    draw_tokens: int = 16
    batch_size: int = 8

    def __post_init__(self):
        """Check ranges."""
        if not self.doses or len(set(self.doses)) < len(self.doses) or not all(map(math.isfinite, self.doses)):
            raise InputError(f"doses are {list(self.doses)}; give one finite number or more, none of them twice")
        if self.unit not in UNITS:
            raise InputError(f"unit is {self.unit!r}, expected one of {', '.join(UNITS)}")
        if self.draws < 0 or min(self.draw_tokens, self.batch_size) < 1:
            found = f"{self.draws} draws of {self.draw_tokens} tokens in batches of {self.batch_size}"
            raise InputError(f"{found}; expected 0 draws or more, and 1 or more of the others")


@dataclass(frozen=True, eq=False)
class DoseCurves:
    """What became of each switch at each dose.

    Attributes:
        layer: Layer after which directions were taken away.
        doses: The doses.
        residual_norm: Median norm of the states that were changed; what a dose of 1 takes away where the unit is `residual`.
        prompts_N: Which prompt each switch is of.
        values: For each measure and each name of directions, [X, N] at X doses of N switches, the mean over the directions of that name.
    """

    layer: int
    doses: tuple[float, ...]
    residual_norm: float
    prompts_N: Int[np.ndarray, " N"]
    values: Mapping[Measure, Mapping[str, Float[np.ndarray, "X N"]]]

    def curve(self, measure: Measure, name: str) -> tuple[Float[np.ndarray, " X"], Float[np.ndarray, " X"]]:
        """Mean over switches at each dose, and its standard error, switches in answers to one prompt taken as one."""
        return clustered_mean(self.values[measure][name].T, self.prompts_N)


def ablate_switches(
    model: LanguageModel,
    points: Sequence[SwitchPoint],
    layer: int,
    directions: Mapping[str, Float[Array, "_W D"] | Float[np.ndarray, "_W D"]],
    script: str,
    config: AblationConfig | None = None,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DoseCurves:
    """Take directions away right before switches, one direction and one dose at a time; all of them share one program.

    Args:
        model: The model.
        points: Where answers switched, see `switch_points`.
        layer: Layer after which to act; the papers take the last.
        directions: By name, such as the language's feature, that of English and some random ones: rows of a matrix, one or several whose
            effects are averaged. They are decoder directions as stored.
        script: Script of the unwanted language.
        config: The sweep.
        progress: Called with the number of passes over the switches done and of all.

    Raises:
        InputError: no switches, no directions, a direction of length 0 with unit `residual`, or a layer out of range.
        ShapeError: directions that are not as wide as the model.
    """
    config = config or AblationConfig()
    if not points or not directions:
        raise InputError(f"{len(points)} switches and {len(directions)} directions; expected 1 or more of each")
    model.check_layer(layer)
    rows = {name: _checked(name, matrix, model.config.d_model) for name, matrix in directions.items()}
    switches = _Switches(model, list(points), script, config)
    norm = switches.norm(layer)
    total = 1 + sum(len(matrix) for matrix in rows.values()) * sum(dose != 0 for dose in config.doses)
    untouched, done = switches.measure([]), 1
    progress(done, total)
    values: dict[Measure, dict[str, Any]] = {measure: {} for measure in untouched}
    for name, matrix in rows.items():
        by_dose = []
        for dose in config.doses:
            found = []
            for direction in matrix if dose else ():
                scale = norm / float(np.linalg.norm(direction)) if config.unit == "residual" else 1.0
                found.append(switches.measure([add_directions(layer, direction[None], -dose * scale, positions=-1, phase="prefill")]))
                done += 1
                progress(done, total)
            by_dose.append({measure: np.mean([one[measure] for one in found or [untouched]], axis=0) for measure in untouched})
        for measure in untouched:
            values[measure][name] = np.stack([one[measure] for one in by_dose])
    return DoseCurves(layer, config.doses, norm, np.array([point.prompt for point in points]), values)


class _Switches:
    """The switches in batches that are made once, and what is measured on them under edits."""

    def __init__(self, model: LanguageModel, points: list[SwitchPoint], script: str, config: AblationConfig):
        self.model, self.points, self.script, self.config = model, points, script, config
        self.mask_V = jnp.asarray(script_tokens(model.tokenizer, model.config.vocab_size, script))
        self.redraw = replace(config.sampling, max_new_tokens=config.draw_tokens)
        order = sorted(range(len(points)), key=lambda row: len(points[row].before))
        groups = [order[start : start + config.batch_size] for start in range(0, len(order), config.batch_size)]
        # The last batch is filled up, so that it compiles nothing new.
        self.batches = [(rows, (rows * config.batch_size)[: config.batch_size]) for rows in groups]

    def norm(self, layer: int) -> float:
        """Median norm of the states right before the switches."""
        found = []
        for rows, filled in self.batches:
            batch = self._padded(filled)
            with jax.set_mesh(self.model.mesh):
                taps = jnp.full((1,), layer, jnp.int32)
                out = forward(self.model.decoder, batch.tokens_BT, batch.segment_ids_BT, (), taps, stop_after=layer)
            assert out.residuals is not None
            found.append(np.linalg.norm(np.asarray(out.residuals[0, : len(rows), -1], np.float32), axis=-1))
        return float(np.median(np.concatenate(found)))

    def measure(self, edits: Sequence[AddDirections]) -> dict[Measure, Float[np.ndarray, " N"]]:
        """Each measure of every switch."""
        names: list[Measure] = ["probability", "drawn", "observed", *(["resampled"] if self.config.draws else [])]
        found: dict[Measure, Any] = {name: np.zeros(len(self.points)) for name in names}
        for rows, filled in self.batches:
            batch = self._padded(filled)
            tokens = jnp.asarray([self.points[row].token for row in filled], jnp.int32)
            sampler = self._sampler(self.config.sampling, [0] * len(filled))
            with jax.set_mesh(self.model.mesh):
                out = forward(self.model.decoder, batch.tokens_BT, batch.segment_ids_BT, tuple(edits), logits="last")
                assert out.logits is not None
                read = np.asarray(next_probabilities(out.logits[:, 0], self.mask_V, tokens, sampler))
            for name, values in zip(names, read, strict=False):
                found[name][rows] = values[: len(rows)]
            for draw in range(self.config.draws):
                found["resampled"][rows] += np.array(self._switches_again(batch, filled, edits, draw)[: len(rows)]) / self.config.draws
        return found

    def _padded(self, rows: list[int]) -> TokenBatch:
        ids = [self.points[row].before for row in rows]
        return pad_batch(ids, length=bucket_length(max(map(len, ids))), side="left")

    def _sampler(self, sampling: SamplingConfig, seeds: list[int]) -> Sampler:
        return Sampler.make(sampling, self.model.config.eos_token_ids, len(seeds), seeds)

    def _switches_again(self, batch: TokenBatch, rows: list[int], edits: Sequence[AddDirections], draw: int) -> list[bool]:
        """Whether a new continuation of each row contains the script; a draw is the same at every dose."""
        sampler = self._sampler(self.redraw, [stable_seed(row, draw) for row in rows])
        decoder, limit = self.model.decoder, jnp.int32(self.config.draw_tokens)
        with jax.set_mesh(self.model.mesh):
            state = prefill(decoder, batch.tokens_BT, batch.segment_ids_BT, sampler, tuple(edits), new_tokens=bucket_length(self.config.draw_tokens))
            state = decode(decoder, state, sampler, tuple(edits), limit)
        tokens, counts, stopped = (np.asarray(array) for array in (state.tokens_BT, state.counts_B, state.done_B))
        texts = []
        for row, new, count, stop in zip(rows, tokens, counts, stopped, strict=True):
            # With the answer before it, which has not switched: what is drawn may begin inside a character.
            point = self.points[row]
            texts.append(self.model.tokenizer.decode([*point.answer_ids[: point.place], *new[: count - stop].tolist()], skip_special_tokens=False))
        return [is_switched(text, self.script) for text in texts]


@jax.jit
def next_probabilities(
    logits_BV: Float[Array, "B V"], mask_V: Bool[Array, " V"], tokens_B: Int[Array, " B"], sampler: Sampler
) -> Float[Array, "3 B"]:
    """How probable it is that the next token is a masked one, that it is when drawn by the sampler, and that it is the one given.

    The second is exact, but for a repetition penalty, which is left aside: what temperature, top-k and top-p leave is known.
    """
    plain_BV = jax.nn.softmax(logits_BV, axis=-1)
    # With temperature 0 the most probable token is drawn, and so it is with one that is next to nothing.
    kept_BV, order_BV = keep_probable(logits_BV / jnp.maximum(sampler.temperature, 1e-6), sampler)
    drawn_B = jnp.sum(jnp.where(mask_V[order_BV], jax.nn.softmax(kept_BV, axis=-1), jnp.float32(0)), axis=-1)
    masked_B = jnp.sum(jnp.where(mask_V, plain_BV, jnp.float32(0)), axis=-1)
    return jnp.stack([masked_B, drawn_B, jnp.take_along_axis(plain_BV, tokens_B[:, None], axis=-1)[:, 0]])


def _checked(name: str, matrix: Any, d_model: int) -> Float[np.ndarray, "W D"]:
    found = np.asarray(matrix, np.float32)
    if found.ndim != 2 or found.shape[1] != d_model or not len(found):
        raise ShapeError(f"directions {name!r} have shape {found.shape}, expected rows as wide as the model: [W, {d_model}]")
    if not np.linalg.norm(found, axis=1).all():
        raise InputError(f"a direction of {name!r} has length 0, so nothing would be taken away")
    return found

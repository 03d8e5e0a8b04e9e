"""The thresholds of all gates, each with its reason. The case file's and the command line's defaults are these.

Imports nothing, so that the command line's help can name them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Threshold:
    """A figure that decides a gate, and why it is that figure."""

    value: float
    why: str


MARGIN = Threshold(
    0.02,
    "a loss that few users notice and that a test of some hundred rows can rule out; two points are what reviews of "
    "classifiers usually allow a cheaper model",
)
FORGETTING_DROP = Threshold(
    0.1,
    "of the 358 shipped questions 36: what a user would notice, and 358 can tell it from none where a quarter of the "
    "answers change. A choice, not yet held against many tuned models",
)
FORGETTING_PERPLEXITY = Threshold(
    1.5,
    "a narrow model's replies become terser, which alone costs some perplexity; half as much again is more",
)
FORGETTING_KNOWN = Threshold(
    0.1, "a base that answers fewer of the general questions than this cannot be seen forgetting them"
)
ROBUSTNESS_GAP = Threshold(
    0.05,
    "what another form of the same question may cost before the model knows the form rather than the task",
)
REVIEW_ACCEPT = Threshold(0.8, "four of five answers acceptable to people, as the lower end of the interval")
ERROR_RATE = Threshold(0.01, "one request in a hundred unanswered is what service agreements usually allow")
SEARCH_LOSS = Threshold(0.02, "the quality margin: a quantisation may cost what another model may")
SLOWER = Threshold(0.05, "changes of a twentieth are seen between two runs of one machine")
AB_ERROR = Threshold(0.05, "the usual rate of false calls over all looks together")
AB_POWER = Threshold(0.8, "the usual power at the planned sample size")
SAMPLE_RATIO = Threshold(
    0.001,
    "usual for sample ratio mismatches (Fabijan et al. 2019, KDD): an A/B test is looked at often, and a true mismatch "
    "of some hundred units is far below it",
)
DRIFT_ALARMS = Threshold(0.01, "one false alarm in a hundred series of looks")


@dataclass(frozen=True)
class Limits:
    """How far an exported file may drift from the evaluated model, by precision; a failing value is beyond its limit.

    The figures compare next-token distributions at the same positions of the same token sequences: `kl` mean
    Kullback-Leibler divergence in nats (reference to export), `top1` share of positions with the same most likely
    token, near-ties aside, `cosine` mean cosine of the centred logits, `perplexity` ratio of the export's perplexity
    on the text to the reference's, `greedy` share of equal greedy answers, near-ties aside, and `task` the loss in the
    task's score. `tie` is the logit gap below which two tokens count as equal.
    """

    kl: float
    top1: float
    cosine: float
    perplexity: float
    greedy: float
    task: float
    tie: float
    why: str

    def as_dict(self) -> dict[str, float | str]:
        """The limits for the report."""
        return asdict(self)


EXACT = Limits(
    1e-6, 0.999, 0.99999, 1.0005, 0.99, 0.0, 0.005,
    "the same numbers in another order of summation: only rounding may differ, with llama.cpp's cache in fp32 too; "
    "SmolLM2-135M shows KL 1e-11, with the cache in fp16 7e-7; tiny models of ten families 1e-9 or less",
)  # fmt: skip
LIMITS: dict[str, Limits] = {
    "f32": EXACT,
    "fp32": EXACT,
    "f16": Limits(
        1e-3, 0.995, 0.9998, 1.005, 0.95, 0.02, 0.05, "weights keep 11 bits: relative error below 5e-4 per weight"
    ),
    "fp16": Limits(
        5e-3, 0.99, 0.9995, 1.01, 0.95, 0.02, 0.1, "weights and activations keep 11 bits, sums may be fp16 too"
    ),
    "bf16": Limits(
        5e-3, 0.98, 0.9995, 1.02, 0.9, 0.02, 0.1, "weights keep 8 bits: relative error below 4e-3 per weight"
    ),
    "q8_0": Limits(
        0.02, 0.97, 0.995, 1.03, 0.9, 0.03, 0.3,
        "8 bits and one scale per 32 weights, activations too in llama.cpp; SmolLM2-135M, a hard case for its size, "
        "shows KL 0.005 and cosine 0.9988",
    ),
}  # fmt: skip
LIMITS["int8"] = LIMITS["q8_0"]
# Learnt from SmolLM2-135M at each type, a hard case for its size (374 positions of 11 prompts, 2026-11-26), some two to
# three times what it shows; a coarse file's tensors are held to its source's as well, far closer.
LIMITS["q6_k"] = Limits(
    0.05, 0.95, 0.99, 1.06, 0.7, 0.05, 0.5, "SmolLM2-135M shows KL 0.014, cosine 0.9967, perplexity 1.016"
)
LIMITS["fp8"] = Limits(
    0.05,
    0.95,
    0.99,
    1.06,
    0.7,
    0.05,
    0.5,
    "4 bits of precision a weight, near q6_k's error; a choice, from q6_k's",
)
for _kind in ("q5_k_m", "q5_0", "q4_k_m", "q4_k_s"):
    LIMITS[_kind] = Limits(
        0.3, 0.8, 0.95, 1.3, 0.5, 0.1, 1.0, "SmolLM2-135M shows KL up to 0.10, cosine 0.978, perplexity 1.10"
    )
for _kind in ("q4_0", "iq4_xs", "iq4_nl", "q3_k_m"):
    LIMITS[_kind] = Limits(
        1.0, 0.6, 0.85, 1.8, 0.3, 0.15, 1.0, "SmolLM2-135M shows KL up to 0.37, cosine 0.917, perplexity 1.38"
    )
for _kind in ("q2_k", "iq3_xxs", "iq2_xs"):
    LIMITS[_kind] = Limits(
        1.5,
        0.5,
        0.75,
        2.5,
        0.2,
        0.2,
        1.0,
        "SmolLM2-135M shows KL 0.51, cosine 0.888, perplexity 1.62 as q2_k",
    )
# Four bits and fewer are for `--allow-drift` or for a search by task score; these catch a broken file.
COARSE = Limits(
    0.5, 0.75, 0.97, 1.5, 0.5, 0.1, 1.0, "4 to 6 bits: the task's score decides, the rest catches damage"
)


def limits(precision: str) -> Limits:
    """The limits of a precision."""
    return LIMITS.get(precision, COARSE)

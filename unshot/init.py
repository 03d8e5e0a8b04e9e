"""`unshot init`: write a commented case file."""

from __future__ import annotations

from pathlib import Path

import click

from unshot.console import Output
from unshot.contracts.manifest import write_text
from unshot.errors import InputError
from unshot.options import common

TEMPLATE = """\
# One case: a long few-shot prompt, its traffic, and the small model it would move into.
# `unshot plan`, `tune`, `export` and `bench` read this file; flags override it. Paths are relative to it.
# A line that starts with "#" and a key shows the default, or what could stand there.

[task]
name = "clauses"
# The long prompt: a system prompt and few-shot examples (JSONL, JSON or CSV rows, or a text with a {{text}} slot).
system = "Classify the contract clause ..."
examples = "few_shot.jsonl"
# The tuned model's short system prompt.
instruction = "Classify the risk of the contract clause."
# Labelled rows to tune and test on: JSONL with `messages` or `prompt` + `completion`, or CSV with columns.
data = "data.jsonl"
# A sample of real inputs (and answers) for token counts; default: `data`.
# inputs = "inputs.jsonl"
# The classes of the answer, and the field that holds the class where the answer is JSON; default: from the data.
# labels = ["low", "high"]
# answer_field = "risk"
# answer_schema = "answer.schema.json"
metric = "macro_f1"            # macro_f1, accuracy, exact_match, json_f1, rouge_l
# target = 0.9                 # tuning stops when validation reaches it; the test split must reach it
# For the plan's triage: what fails today, what the prompt reaches, how many labelled examples could be had.
# fails = ["cost", "latency"]  # facts, tools, format, jargon, reasoning, latency, cost
# current = 0.8
# examples_at_hand = 300

[traffic]
rate = 5.0                     # mean requests per second
peak_factor = 2.0              # peak rate / mean rate
# arrival_cv = 1.5              # spread of the gaps between requests: 1 Poisson, more bursty
# output_tokens = 40           # answer length where no answers are at hand
offline = false                # true: answers may wait a day, so that batch prices apply

[traffic.slo]                  # milliseconds at a percentile
# ttft_ms = 500
# tpot_ms = 50
# e2e_ms = 2000
percentile = 95

[baseline]                     # what runs today: an API model, or a base model with the long prompt
api = "gpt-4o"
# model = "llama-3.1-8b"
# gpu = "h100-sxm"
# precision = "fp16"

[candidate]                    # the small model
model = "llama-3.1-8b"
gpu = ["h100-sxm", "l4"]
precision = "fp16"             # fp32, fp16, bf16, fp8, int8, int4

[plan]                         # what the forecast assumes; dollars are US dollars
examples = 300                 # labelled examples the tuned model needs
labels_by = "expert"           # who writes the missing ones: expert, llm_reviewed
# example_cost = 4.0           # $ per example; default by labels_by
engineer_day = 800.0
engineering_days = 10.0        # to the first deployment
evaluation_answers = 200       # answers an expert judges before a release
retrain_per_year = 4.0
operations_days = 1.0          # per month, to run own GPUs
min_replicas = 2               # kept up for availability
adapters = 8                   # tuned tasks that share one base in the many-adapters option
horizon_months = 12.0          # one-off costs are spread over these months
# cheaper_api = "gpt-4o-mini"  # cheaper API model to compare with; "none" leaves it out

[tune]
method = "lora"                # lora, dora, qlora (CUDA), full, prompt
rank = 16
# layers = 20                  # adapt only the last so many layers: faster, the lower ones need no gradients
# alpha = 32                   # default 2 x rank
dropout = 0.0
# virtual_tokens = 20          # method = "prompt": trained vectors before each row
# gradient_checkpointing = true  # less memory for a third more work; default: where the memory estimate asks for it
# learning_rate = 5e-4         # default by method and model width
epochs = 5                     # at most: training stops at the plateau
patience = 2                   # epochs without improvement before it stops
batch_tokens = 2048            # longest packed sequence, tokens
max_length = 2048              # longest row, tokens
# mix = "general.jsonl"        # general rows to train on too, against forgetting
mix_share = 0.1                # their share of the training rows
augment_format = false         # vary wrapping and whitespace of half the training prompts
# embedder = "all-minilm-l6-v2"  # finds test rows like train rows in other words; a directory, or "off"
forgetting = true              # measure general abilities before and after tuning
# general = "held-out.jsonl"   # rows for that; default: the shipped ones
forgetting_drop = 0.1          # how far accuracy on them may fall
robustness = true              # ask test rows again in another form
robustness_gap = 0.05          # how far the score may fall there
strict = false                 # true: exit code 1 where a gate fails
seed = 0

[export]
to = ["gguf:q8_0"]             # gguf:f16, gguf:q8_0, gguf:q4_k_m, onnx:fp32, genai:int4, ...

[bench]
requests = 64
concurrency = 1
margin = 0.02                  # how much worse the candidate's metric may be
seed = 0

[bench.claim]                  # "5 to 10 times faster and cheaper"
low = 5.0
high = 10.0
"""


@click.command()
@click.argument("path", type=click.Path(path_type=Path), default=Path("unshot.toml"))
@click.option("--overwrite", is_flag=True, help="Replace the file where it exists.")
@common
def init(path: Path, overwrite: bool, out: Output) -> None:
    """Write a commented case file to PATH (default ./unshot.toml)."""
    if path.is_dir():
        path = path / "unshot.toml"
    if path.exists() and not overwrite:
        raise InputError(f"{path}: already there; choose another name or pass --overwrite")
    write_text(path, TEMPLATE)
    out.result({"path": str(path)}, f"wrote {path}; edit it, then run `unshot plan --case {path}`")

"""The part of an ONNX export that needs optimum: `python optimum_child.py supports TYPE | export SOURCE FOLDER`.

Run by its path, with the standard library and optimum alone, so that optimum can live in another environment than
unshot: it holds transformers below 4.58. Exit 2: the architecture is unknown; 3: optimum cannot be imported.
"""

from __future__ import annotations

import logging
import sys
import warnings

TASK = "text-generation-with-past"


def supports(model_type: str) -> int:
    """Whether optimum has a decoder graph with KV cache for a model type."""
    from optimum.exporters.tasks import TasksManager

    try:
        tasks = TasksManager.get_supported_tasks_for_model_type(
            model_type, "onnx", library_name="transformers"
        )
    except KeyError:
        return 2
    return 0 if TASK in tasks else 2


def export(source: str, folder: str) -> int:
    """Write the fp32 graph of a Hugging Face directory."""
    from optimum.exporters.onnx import main_export

    logging.getLogger("optimum").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    main_export(
        source,
        output=folder,
        task=TASK,
        device="cpu",
        dtype="fp32",
        do_validation=False,
        trust_remote_code=False,
    )
    return 0


if __name__ == "__main__":
    try:
        # With its model configs: TasksManager knows nothing before they are loaded.
        import optimum.exporters.onnx.model_configs  # noqa: F401
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(3)
    verb, *rest = sys.argv[1:]
    sys.exit(supports(*rest) if verb == "supports" else export(*rest))

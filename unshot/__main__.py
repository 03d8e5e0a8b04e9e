"""Entry point: runs the command line and turns every failure into one line and an exit code."""

from __future__ import annotations

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # the current directory, whose files may have the names of ours or of a library

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from unshot.child import ROOMS, protect

protect()

import click  # noqa: E402

from unshot.cli import cli  # noqa: E402
from unshot.console import Output, json_line, printable  # noqa: E402
from unshot.errors import EXIT_OUTSIDE, EXIT_USAGE, UnshotError  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    """Run `unshot` with `argv` (default: the process's arguments) and exit with its status."""
    # pydantic (under genai-prices) would read every installed package's metadata for plugins; none is of use here.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    args = list(sys.argv[1:] if argv is None else argv)
    json_mode = "--json" in args
    # The command's own Output, so that what went wrong after its result is known not to be the result.
    holder = Output(json_mode=json_mode)
    try:
        code = cli.main(args=args, prog_name="unshot", standalone_mode=False, obj=holder)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.exceptions.Abort:
        fail(holder, "interrupted", 130)
    except click.UsageError as error:
        where = f" (see `{error.ctx.command_path} --help`)" if error.ctx else ""
        fail(holder, f"{error.format_message()}{where}", EXIT_USAGE)
    except click.ClickException as error:
        fail(holder, error.format_message(), EXIT_USAGE)
    except UnshotError as error:
        fail(holder, str(error), error.exit_code)
    except KeyboardInterrupt:
        fail(holder, "interrupted; nothing was left under its final name, the same command resumes", 130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(EXIT_OUTSIDE)
    except MemoryError:
        fail(holder, "out of memory; use a smaller model, batch or sequence length", EXIT_OUTSIDE)
    except Exception as error:  # the last net: a user never sees a traceback unless they ask
        if "-v" in args or "--verbose" in args:
            raise
        misnamed = isinstance(error, OSError) and error.filename and error.errno in MISNAMED
        fail(holder, describe(error), EXIT_USAGE if misnamed else EXIT_OUTSIDE)


# What a file that was named wrongly comes to; the rest (a full disk, a broken one) is outside.
MISNAMED = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EEXIST, errno.EACCES, errno.EPERM,
    errno.ENXIO, errno.ENODEV,
)  # fmt: skip
# What a library is installed with; the others come with `all`.
EXTRAS = {
    **dict.fromkeys(("torch", "transformers", "peft", "accelerate", "huggingface_hub", "gguf", "scipy"), "tune"),
    **dict.fromkeys(("llama_cpp", "onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai"), "export"),
    **dict.fromkeys(("psutil", "ddsketch", "pynvml"), "bench"),
    **dict.fromkeys(("starlette", "uvicorn", "aiohttp", "prometheus_client", "sklearn"), "deploy"),
    "pyarrow": "parquet", "ray": "ray", "mlflow": "mlflow", "bitsandbytes": "qlora", "trl": "prefer",
}  # fmt: skip


LONGEST = 1000  # characters of a message that are shown from its beginning and its end


def describe(error: BaseException) -> str:
    """One line for an error that no part of unshot foresaw."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        library = error.name.split(".")[0]
        if library not in ROOMS:
            extra = EXTRAS.get(library, "all")
            return (
                f"this command needs {library}, which is not installed; run `pip install 'unshot[{extra}]'`"
            )
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"no space left on the disk of {seen.filename or 'the output directory'}; free some and run again"
        seen = seen.__cause__ or seen.__context__
    text = " ".join(str(error).split())
    if "No space left on device" in text:
        return "no space left on the disk; free some and run again"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if "out of memory" in text.lower():
        return f"out of memory ({text[:160]}); use a smaller model, batch or sequence length"
    return f"internal error: {type(error).__name__}: {text[:300]} (run again with -v for the traceback)"


def fail(out: Output, message: str, code: int) -> None:
    """Print `message` as one line on stderr, in JSON mode also on stdout where no result is; exit with `code`.

    What it quotes may be of any length: its middle is cut.
    """
    if len(message) > 2 * LONGEST:
        left_out = len(message) - 2 * LONGEST
        message = f"{message[:LONGEST]} [... {left_out:,} characters ...] {message[-LONGEST:]}"
    if out.json_mode and not out.result_printed:
        sys.stdout.write(json_line({"error": message, "exit_code": code}))
    sys.stderr.write(f"error: {printable(' '.join(message.split()))}\n")
    sys.exit(code)


if __name__ == "__main__":
    if os.environ.get("RANK", "0") != "0":  # under torchrun the first process alone prints the result
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (open until the process ends)
    main()

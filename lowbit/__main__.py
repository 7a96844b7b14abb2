"""``python -m lowbit``: what was built, what can run here, and a numeric self-test (exit status 1 if it fails)."""

import argparse
import platform
import subprocess
import sys

import torch

from . import __version__, backends, selftest


def gpu_name() -> str:
    """The GPU, and what serves it."""
    if not torch.cuda.is_available():
        return "none found"
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    reason = backends.native.missing_cuda_reason()
    return f"{torch.cuda.get_device_name()}, compute capability {capability}{'' if reason is None else f' ({reason})'}"


def main(arguments: list[str] | None = None) -> int:
    """What the command prints; returns its exit status. ``arguments``: of the command line, by default this one's."""
    parser = argparse.ArgumentParser(
        prog="python -m lowbit",
        description="Print what was built and what can run here, then check each kernel set that can run, also a "
        "GPU's, against the fp32 reference. The exit status is 1 if a check fails.",
    )
    parser.add_argument("--self-test", action="store_true", help="run the checks (also without this option)")
    parser.parse_args(arguments)

    # In a clone, `python -m` imports the sources. Whoever has just installed lowbit asks about what was installed.
    if (copy := backends.native.installed_copy()) is not None:
        print(f"The sources in {backends.native.PACKAGE} are not built. The installed lowbit:", flush=True)
        options = sys.argv[1:] if arguments is None else arguments
        return subprocess.run([sys.executable, "-m", "lowbit", *options], cwd=copy.parent).returncode

    print(f"lowbit {__version__} in {backends.native.PACKAGE}")
    print(f"torch {torch.__version__}, Python {platform.python_version()}")
    for name, reason in backends.available().items():
        print(f"backend {name:9} {'available' if reason is None else f'not available: {reason}'}")
    isas = selftest.isa_names()
    print(f"CPU kernels       {', '.join(isas) + f' ({isas[0]} in use)' if isas else 'none built'}")
    print(f"CPU threads       {torch.get_num_threads()}")
    capabilities = ", ".join(backends.native.CUDA_CAPABILITIES)
    print(f"CUDA kernels      {f'compiled for {capabilities} and later' if capabilities else 'not built'}")
    print(f"GPU               {gpu_name()}")

    results = selftest.run()
    failures = [(name, problem) for name, problem in results if problem is not None]
    for name, problem in failures:
        print(f"FAILED {name}: {problem}")
    print(f"self-test         {len(results) - len(failures)} of {len(results)} checks passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

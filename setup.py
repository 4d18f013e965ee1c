"""Build: finds torch and nvcc, lists the sources, and says in one sentence what is missing.

PAGED_OPS_CUDA=auto|1|0   build the CUDA kernels where nvcc is found (default), always, or never.
TORCH_CUDA_ARCH_LIST      GPU architectures, by default "8.0+PTX;9.0a".
MAX_JOBS                  compilers that ninja runs side by side.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

MIN_TORCH = (2, 10)
TORCH_TARGET_VERSION = "0x020a000000000000"  # the LibTorch stable ABI of 2.10
# Python's own flags ask for debug information, which takes a third of the time and is stripped off.
CXX_FLAGS = ["-std=c++17", "-fvisibility=hidden", "-Wall", "-g0"]
ROOT = Path(__file__).parent.resolve()


def stop(sentence: str) -> None:
    """End the build with one sentence instead of a traceback."""
    sys.exit(f"paged_ops: {sentence}")


def import_cpp_extension():
    try:
        import torch
    except ImportError:
        stop(
            "torch is needed to build; run: pip install torch 'setuptools>=77' wheel ninja && "
            "pip install --no-build-isolation ."
        )
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < MIN_TORCH:
        wanted = ".".join(map(str, MIN_TORCH))
        stop(f"torch {wanted} or newer is needed, found {torch.__version__}.")
    from torch.utils import cpp_extension

    return cpp_extension


def check_compiler() -> None:
    compiler = os.environ.get("CXX", "g++").split()[-1]
    if shutil.which(compiler) is None:
        stop(
            f"a C++17 compiler is needed and {compiler} is not on the PATH; set CXX or install g++."
        )


def find_cuda_root() -> str | None:
    """Where the toolkit lies, asked of nvcc itself: on the PATH it may be a wrapper."""
    nvcc = shutil.which("nvcc") or os.path.join(os.environ.get("CUDA_HOME", ""), "bin", "nvcc")
    if not os.path.exists(nvcc):
        return None
    # nvcc prints its own folder as _HERE_ on stderr.
    dryrun = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True
    )
    here = re.search(r"_HERE_=(\S+)", dryrun.stderr)
    return str(Path(here.group(1)).parent) if here else None


def choose_cuda() -> str | None:
    wish = os.environ.get("PAGED_OPS_CUDA", "auto")
    if wish not in ("auto", "1", "0"):
        stop(f"PAGED_OPS_CUDA must be auto, 1 or 0, got {wish!r}.")
    root = None if wish == "0" else find_cuda_root()
    if wish == "1" and root is None:
        stop("PAGED_OPS_CUDA=1 needs nvcc, which is neither on the PATH nor in CUDA_HOME/bin.")
    if root is None:
        print(
            "paged_ops: building the CPU kernels only (no nvcc, or PAGED_OPS_CUDA=0)",
            file=sys.stderr,
        )
    return root


def operator_library(cpp_extension, cuda_root: str | None):
    sources = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]
    link_args = ["-Wl,--exclude-libs,ALL", "-s"]
    if cuda_root:
        sources += ROOT.glob("csrc/cuda/**/*.cu")
        # The static runtime leaves the library loadable where there is no CUDA at all.
        link_args += [f"-L{cuda_root}/lib64", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    return cpp_extension.CppExtension(
        "paged_ops._C",
        sorted(str(path.relative_to(ROOT)) for path in sources),
        include_dirs=[f"{cuda_root}/include"] if cuda_root else [],
        # Named, so that a compiler wrapper which links libstdc++ statically cannot split it in
        # two: an exception must cross into torch.
        libraries=["stdc++"],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args={
            "cxx": ["-O3", *CXX_FLAGS, "-Wno-attributes"],
            "nvcc": ["-O3", "-std=c++17", "-Xcompiler", "-fvisibility=hidden", "--threads=1"],
        },
        extra_link_args=link_args,
        py_limited_api=True,
    )


def block_manager_module(cpp_extension):
    """The torch-free binding; of torch it takes nothing but the headers of pybind11."""
    sources = sorted(ROOT.glob("csrc/block_manager/*.cpp"))
    return Extension(
        "paged_ops._block_manager",
        [str(path.relative_to(ROOT)) for path in sources],
        include_dirs=cpp_extension.include_paths(),
        language="c++",
        extra_compile_args={"cxx": ["-O3", *CXX_FLAGS]},
        extra_link_args=["-s"],
    )


def drop_stale_cuda_objects(folder: Path) -> None:
    """Beside a CPU-only torch ninja is not told which headers nvcc has read, so an edit of a header
    would leave objects that take the structs of params.h to be laid out otherwise."""
    headers = [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*.h"), *ROOT.glob("csrc/cuda/*.cuh")]
    newest = max(path.stat().st_mtime for path in headers)
    for compiled in folder.glob("csrc/cuda/**/*.o"):
        if compiled.stat().st_mtime < newest:
            compiled.unlink()


def build_command(cpp_extension, cuda_root: str | None):
    if cuda_root:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0+PTX;9.0a")
        # torch forgets CUDA_HOME beside a CPU-only build, and compares nvcc's version with its own
        # CUDA, of which the stable ABI and the static runtime are independent.
        cpp_extension.CUDA_HOME = cuda_root
        cpp_extension._check_cuda_version = lambda *_: None

    class BuildExtension(cpp_extension.BuildExtension):
        def build_extension(self, ext):
            drop_stale_cuda_objects(Path(self.build_temp))
            super().build_extension(ext)

    return BuildExtension.with_options(use_ninja=shutil.which("ninja") is not None)


def main() -> None:
    if not {"build_ext", "bdist_wheel", "develop", "install", "editable_wheel"} & set(sys.argv):
        setup()  # metadata only
        return
    cpp_extension = import_cpp_extension()
    check_compiler()
    cuda_root = choose_cuda()
    setup(
        ext_modules=[
            operator_library(cpp_extension, cuda_root),
            block_manager_module(cpp_extension),
        ],
        cmdclass={"build_ext": build_command(cpp_extension, cuda_root)},
    )


if __name__ == "__main__":
    main()

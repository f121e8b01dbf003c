"""engine/native.c and forms.h, compiled for this machine and called from Python: transformer.py's twin for CPUs.

Nothing else is needed than a C compiler (cc, gcc, clang). The library is kept in the cache, by the hash of its source,
compiler and processor. Where there is no compiler, or it fails, the engine runs on transformer.py.
"""

import ctypes
import hashlib
import mmap
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from array import array
from collections.abc import Iterator, Sequence
from ctypes import POINTER, Structure, byref, c_double, c_float, c_int32, c_long, c_void_p
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

from config import ROOT, cache_dir, keep
from engine.shape import Shape
from engine.step import Step
from engine.transformer import Loader, zeros
from weights.tensors import Tensors

SOURCE = Path(__file__).with_suffix(".c")
PHASES = ("embedding", "norms", "q, k, v", "rotate, keep", "attention", "out", "up", "down", "head")
PANEL = 16  # as in native.c; also the only size of a block that it knows
FORMS = ("float32", "float16", "bfloat16", "int8", "int4")  # enum Form in forms.h
SMALLEST_FIRST = ("int4", "int8", "bfloat16", "float16", "float32")
EXACT = "exact"
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC")


class NotAvailable(Exception):
    """No native code here, and why."""


class Matrix(Structure):
    _fields_ = (
        ("weights", c_void_p), ("bias", c_void_p), ("outputs", c_long), ("inputs", c_long), ("form", c_long),
    )  # fmt: skip


class Norm(Structure):
    _fields_ = (("weight", c_void_p), ("bias", c_void_p))


class Layer(Structure):
    _fields_ = (
        *((name, Norm) for name in ("norm1", "norm2", "q_norm", "k_norm")),
        *((name, Matrix) for name in ("qkv", "out", "gate", "up", "down")),
    )


class Model(Structure):
    _fields_ = (
        *((name, c_long) for name in ("layers", "hidden", "heads", "kv_heads", "dim", "inner", "window")),
        ("cache_form", c_long), ("eps", c_float), ("layer", POINTER(Layer)), ("norm", Norm), ("head", Matrix),
        ("embedding", Matrix), ("positions", c_void_p), ("angles", c_void_p), ("keys", c_void_p), ("values", c_void_p),
    )  # fmt: skip


class StepOf(Structure):
    _fields_ = (
        ("rows", c_long), ("parts", c_long), ("wanted", c_long), ("token", c_void_p), ("position", c_void_p),
        ("wanted_row", c_void_p), ("part", c_void_p), ("part_of", c_void_p),
    )  # fmt: skip


# ---- the library


@cache
def library() -> ctypes.CDLL:
    """The compiled functions. NotAvailable when there is no compiler that can make them."""
    path = compiled()
    if not path.exists():
        build(path)
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise NotAvailable(f"the compiled library cannot be loaded ({error})") from error
    for name in ("scratch_floats", "kept_bytes", "pack"):
        getattr(loaded, name).restype = c_long
    return loaded


def compile_beside() -> str | None:
    """None when it is compiled. Else the reason why it is not there now, and it is being compiled if it can be.

    Nobody's first token waits for the compiler; and it runs in a process of its own, since this one may end first.
    """
    try:
        path = compiled()
    except NotAvailable as why:
        return str(why)
    if path.exists():
        return None
    failure = path.with_suffix(".failed")
    if failure.exists():
        return failure.read_text()
    compiling = subprocess.Popen(
        [sys.executable, "-m", "engine.native"], cwd=ROOT, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    threading.Thread(target=compiling.wait, daemon=True).start()  # no zombie is left in a long life
    return "native.c is being compiled: the next start uses it"


def compiled() -> Path:
    """Where the library for this source, compiler and processor lies, once it was made."""
    source = SOURCE.read_text() + SOURCE.with_name("forms.h").read_text()
    identity = (source, compiler(), FLAGS, platform.machine(), cpu_flags())
    return cache_dir() / "native" / f"{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}.so"


def compiler() -> str:
    found = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if found is None:
        raise NotAvailable("there is no C compiler (cc, gcc, clang)")
    return found


def cpu_flags() -> str:
    """What the processor can do: the cache may be on a disk that several machines share."""
    try:
        return next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return platform.processor()


def build(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [compiler(), *FLAGS, str(SOURCE), "-o", str(made), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            why = f"{command[0]} failed: {done.stderr.strip()[-300:]}"
            keep(path.with_suffix(".failed"), why)  # compile_beside() does not try again for ever
            raise NotAvailable(why)
        os.replace(made, path)


# ---- the network


def runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The first and the last of each row of neighbours among them."""
    ordered = sorted(numbers)
    begin = 0
    for i in range(1, len(ordered) + 1):
        if i == len(ordered) or ordered[i] != ordered[i - 1] + 1:
            yield ordered[begin], ordered[i - 1]
            begin = i


class NativeTransformer:
    """The face of transformer.Transformer. All arithmetic is float32; cache: float32 or float16.

    form: how weights are kept, one of FORMS; EXACT gives each matrix the smallest form that holds its very numbers.
    A checkpoint that was quantised or rounded once (Q4_1, Q8_0, bfloat16) is then read as the few bytes it was.
    """

    def __init__(
        self, shape: Shape, tensors: Tensors, form: str, cache: torch.dtype, *, blocks: int, threads: int
    ) -> None:
        self.c, self.shape, self.threads = library(), shape, threads
        self.form = form
        self.kept: list[torch.Tensor] = []  # those whose addresses C holds
        self.bytes_by_form: dict[str, int] = {}
        loader = Loader(shape, tensors, self.packed, torch.device("cpu"), torch.float32)
        gpt2 = shape.family == "gpt2"
        self.layers = (Layer * shape.layers)(*(self.layer(loader, i) for i in range(shape.layers)))
        # Block by block, not layer by layer: memory comes in pages of up to 2 MB, and is taken as tokens come.
        kv = (blocks, shape.layers, shape.kv_heads, shape.head_dim, PANEL)
        self.keys, self.values = (zeros(kv, cache, torch.device("cpu")) for _ in "kv")
        head = loader.head()
        self.model = Model(
            layers=shape.layers, hidden=shape.hidden, heads=shape.heads, kv_heads=shape.kv_heads, dim=shape.head_dim,
            inner=shape.inner, window=shape.window or 0,
            cache_form=FORMS.index(str(cache).removeprefix("torch.")), eps=shape.norm_eps, layer=self.layers,
            norm=self.norm(loader, "ln_f" if gpt2 else "norm"),
            head=head,
            embedding=head if loader.tied else self.packed(loader.take(loader.embedding + ".weight"), None),
            positions=self.keep(loader.table("wpe")) if gpt2 else None,
            angles=self.keep(torch.tensor(shape.rope)) if shape.rope else None,
            keys=self.keep(self.keys), values=self.keep(self.values),
        )  # fmt: skip
        self.scratch = torch.empty(0)
        self.spent: ctypes.Array | None = None  # seconds by PHASES, while somebody wants to know

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.kept) - self.keys.nbytes - self.values.nbytes

    def give_back(self, blocks: Sequence[int]) -> None:
        """The memory of these blocks' keys and values, to the system; what was in them is zero from then on."""
        advise = getattr(ctypes.CDLL(None), "madvise", None)
        dont_need = getattr(mmap, "MADV_DONTNEED", None)
        if advise is None or dont_need is None:  # no Linux
            return
        advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for kept in (self.keys, self.values):
            size = kept[0].nbytes
            for first, last in runs(blocks):
                start = -(-(kept.data_ptr() + first * size) // mmap.PAGESIZE) * mmap.PAGESIZE
                end = (kept.data_ptr() + (last + 1) * size) // mmap.PAGESIZE * mmap.PAGESIZE
                if end > start:  # only whole pages: others' numbers lie in the rest
                    advise(start, end - start, dont_need)

    def layer(self, loader: Loader, i: int) -> Layer:
        if self.shape.family == "gpt2":
            p = f"h.{i}."
            return Layer(
                norm1=self.norm(loader, p + "ln_1"), norm2=self.norm(loader, p + "ln_2"),
                qkv=loader.linear(p + "attn.c_attn"), out=loader.linear(p + "attn.c_proj"),
                up=loader.linear(p + "mlp.c_fc"), down=loader.linear(p + "mlp.c_proj"),
            )  # fmt: skip
        p, a = f"layers.{i}.", f"layers.{i}.self_attn."
        return Layer(
            norm1=self.norm(loader, p + "input_layernorm"), norm2=self.norm(loader, p + "post_attention_layernorm"),
            q_norm=self.norm(loader, a + "q_norm"), k_norm=self.norm(loader, a + "k_norm"),
            qkv=loader.linear(a + "q_proj", a + "k_proj", a + "v_proj"), out=loader.linear(a + "o_proj"),
            gate=loader.linear(p + "mlp.gate_proj"), up=loader.linear(p + "mlp.up_proj"),
            down=loader.linear(p + "mlp.down_proj"),
        )  # fmt: skip

    def packed(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Matrix:
        (outputs, inputs), source = weight.shape, weight.float().contiguous()
        size = c_void_p(source.data_ptr()), c_long(outputs), c_long(inputs)
        for name in SMALLEST_FIRST if self.form == EXACT else (self.form,):
            form = FORMS.index(name)
            kept = torch.empty(self.c.kept_bytes(*size[1:], form), dtype=torch.uint8)
            same = self.c.pack(*size, form, c_long(self.form == EXACT), c_void_p(kept.data_ptr()))
            if same or self.form != EXACT:
                break
        self.bytes_by_form[name] = self.bytes_by_form.get(name, 0) + kept.nbytes
        filled = None if bias is None else self.keep(F.pad(bias.float(), (0, -outputs % PANEL)))
        return Matrix(self.keep(kept), filled, outputs, inputs, form)

    def norm(self, loader: Loader, name: str) -> Norm:
        if not loader.has(name + ".weight"):
            return Norm()
        weight, bias = loader.norm_weights(name)
        return Norm(self.keep(weight), None if bias is None else self.keep(bias))

    def keep(self, tensor: torch.Tensor) -> int:
        tensor = tensor.contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()

    def forward(self, step: Step) -> torch.Tensor:
        """Compute all rows of the step, keep their keys and values; logits (wanted rows, vocabulary) in float32."""
        rows, context = len(step.tokens), max(part.length for part in step.parts)
        need = self.c.scratch_floats(byref(self.model), c_long(rows), c_long(context), c_long(self.threads))
        if need > len(self.scratch):
            self.scratch = torch.empty(need)
        part_of = [i for i, part in enumerate(step.parts) for _ in range(part.count)]
        # Python's own arrays: with 16 requests, ctypes' would take a tenth of a millisecond in every step.
        numbers = [array("i", row) for row in (step.tokens, step.positions, step.wanted, part_of)]
        tables = [array("i", part.blocks) for part in step.parts]
        parts = array("l")  # four longs each, as struct Part in native.c
        for part, table in zip(step.parts, tables, strict=True):
            parts.extend((part.first, part.count, part.length, table.buffer_info()[0]))
        token, position, wanted, owners, planned_parts = (row.buffer_info()[0] for row in (*numbers, parts))
        planned = StepOf(rows, len(step.parts), len(step.wanted), token, position, wanted, planned_parts, owners)
        wanted_rows = len(step.wanted)
        logits = torch.empty(wanted_rows, self.shape.vocabulary)
        best, tokens = (c_float * wanted_rows)(), (c_int32 * wanted_rows)()
        self.c.forward(
            byref(self.model),
            byref(planned),
            c_long(context),
            c_long(self.threads),
            c_void_p(self.scratch.data_ptr()),
            c_void_p(logits.data_ptr()),
            best,
            tokens,
            self.spent,
        )
        self.found = list(best), list(tokens)
        return logits

    def bytes_by_phase(self) -> dict[str, int]:
        """What a step reads of the weights, all layers together."""
        parts = {"q, k, v": ("qkv",), "out": ("out",), "up": ("up", "gate"), "down": ("down",)}
        found = {
            phase: sum(self.bytes_of(getattr(layer, name)) for layer in self.layers for name in names)
            for phase, names in parts.items()
        }
        return found | {"head": self.bytes_of(self.model.head)}

    def bytes_of(self, matrix: Matrix) -> int:
        return self.c.kept_bytes(c_long(matrix.outputs), c_long(matrix.inputs), matrix.form)

    def anatomy(self, step: Step) -> dict[str, float]:
        """Compute the step; the seconds of each phase, all layers together."""
        self.spent = (c_double * len(PHASES))()
        try:
            self.forward(step)
            return dict(zip(PHASES, self.spent, strict=True))
        finally:
            self.spent = None

    def likeliest(self, _logits: torch.Tensor) -> tuple[list[float], list[int]]:
        """The greatest of each row of the last forward(), and its token."""
        return self.found


if __name__ == "__main__":  # `make` compiles it when it installs
    try:
        library()
        print(f"native.c is compiled: {compiled()}")
    except NotAvailable as why:
        print(f"native.c is not used: {why}")

"""A pretended accelerator: tensors of the device "pretend:0", whose bytes lie in CPU memory.

    import pretend

    pretend.install()             # torch.accelerator.current_accelerator() is pretend:0 from now on
    model.to("pretend")
    pretend.reset()
    step()
    pretend.counts().kernels      # launches by operation; sum(...values()) is what a step costs
    pretend.counts().waits        # what made the host wait for the device, {} in a good loop
    pretend.counts().copies       # how often bytes went to the device and back, by way

It computes what the CPU computes, bit for bit, and behaves as a GPU does where ours could be wrong:

- An operation that mixes its tensors with those of the CPU is refused, but for a scalar (0
  dimensions) and for the indices of an index operation, as on CUDA.
- A non-blocking copy to the CPU is rubbish until somebody waits for the device.
- It counts. A foreach operation is as many launches as CUDA makes of so many tensors; any other
  operation is one, though on CUDA a few take two or three.

It is a PrivateUse1 backend in pure Python, which PyTorch calls experimental. It has no second
index, no memory of its own to run out of, one stream, and no generators but the CPU's. install()
lasts for the process, so that a test has a process of its own do what needs the device:

    status, printed, errors = pretend.in_new_process(code, *arguments)
"""

import contextlib
import ctypes
import io
import math
import multiprocessing
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "pretend"
RUBBISH = 113  # what a copy holds that nobody has waited for
FOREACH_TENSORS = (110, 64, 48, 36, 30)  # in a launch of 1..5 lists (MultiTensorApply.cuh)
DL_CPU, DL_OTHER = 1, 12  # device types of DLPack; PyTorch takes the second for PrivateUse1
LOWER_PRECISION = ("conv2d.default", "conv_transpose2d.input", "linear.default", "matmul.default")

aten = torch.ops.aten
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_lock = threading.RLock()  # worker threads and loaders copy from threads of their own
_on_the_way: list[tuple[Tensor, Tensor]] = []  # destinations on the CPU, and what will arrive there
_libraries: list[torch.library.Library] = []  # what is registered is forgotten with its library


class Counts(NamedTuple):
    """What the device was asked for since `reset`."""

    kernels: Counter[str]  # launches, by operation; copies are among them
    waits: Counter[str]  # operations whose answer the host stood still for
    copies: Counter[str]  # between device and CPU, by direction and manner


_counts = Counts(Counter(), Counter(), Counter())


def counts() -> Counts:
    """Return a copy of the counts since the last `reset`."""
    with _lock:
        return Counts(*(Counter(counter) for counter in _counts))


def reset() -> None:
    """Count from zero again."""
    with _lock:
        for counter in _counts:
            counter.clear()


def wait(reason: str) -> None:
    """Let the host wait, which lets all copies on the way arrive."""
    with _lock:
        _counts.waits[reason] += 1
        for destination, content in _on_the_way:
            destination.copy_(content)
        _on_the_way.clear()


def pretends(value: Any) -> bool:
    """Return whether this is a tensor of the device."""
    return isinstance(value, Tensor) and value.device.type == NAME


def _relabelled(tensor: Tensor, device_type: int) -> Tensor:
    """Return a tensor of another device that shares the memory.

    A DLPack capsule points to a DLTensor: a pointer to the data, then the type of the device.
    """
    capsule = torch._C._to_dlpack(tensor)
    address = _capsule_pointer(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)
    ctypes.c_int32.from_address(address).value = device_type
    return torch._C._from_dlpack(capsule)


def to_cpu(value: Any) -> Any:
    """Return the same memory as a CPU tensor, the CPU for the device, all else as it is."""
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return _relabelled(value, DL_CPU) if pretends(value) else value


def to_device(value: Any) -> Any:
    """Return the memory of a CPU tensor as one of the device, all else as it is."""
    return _relabelled(value, DL_OTHER) if isinstance(value, Tensor) else value


def run(operation: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Do what an operation does to tensors of the device: the backend's fallback for all."""
    schema = operation._schema
    name = schema.name.removeprefix("aten::")
    is_view = any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
    if is_view or name == "set_":  # touches no memory: the CPU's kernel keeps the device
        return operation.redispatch(
            torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs
        )
    leaves, spec = pytree.tree_flatten((args, kwargs))
    _refuse_the_cpu(name, leaves)
    _count(operation, name, leaves, args)
    cpu_args, cpu_kwargs = pytree.tree_unflatten([to_cpu(leaf) for leaf in leaves], spec)
    written = {}  # arguments that are written to, by their letter in the schema
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info and argument.alias_info.is_write:
            target = args[i] if i < len(args) else kwargs[argument.name]
            written[str(argument.alias_info.before_set)] = target
            if argument.is_out and pretends(target) and not target.numel():
                cpu_kwargs[argument.name] = torch.empty(0, dtype=target.dtype)  # it will grow
    results = _overload(operation, args)(*cpu_args, **cpu_kwargs)
    if len(schema.returns) == 1:
        results = (results,)
    found = []
    for result, returned in zip(results or (), schema.returns, strict=bool(results)):
        if returned.alias_info:
            target = written[str(returned.alias_info.before_set)]
            if target.shape != result.shape:
                aten.set_.source_Tensor(target, to_device(result))
            found.append(target)
        else:
            found.append(pytree.tree_map(to_device, result))
    return found[0] if len(found) == 1 else tuple(found) or None


def _overload(operation: torch._ops.OpOverload, args: tuple) -> Callable:
    """Return what to call: a number that C++ made a tensor of is one again, so not `.Tensor`."""
    for argument, value in zip(operation._schema.arguments, args, strict=False):
        if str(argument.type) == "Tensor" and isinstance(value, (int, float)):
            return operation.overloadpacket
    return operation


def _refuse_the_cpu(name: str, leaves: list[Any]) -> None:
    for leaf in leaves if "index" not in name else leaves[:1]:
        if isinstance(leaf, Tensor) and leaf.ndim and not pretends(leaf):
            shape = tuple(leaf.shape)
            raise RuntimeError(f"{name}: a tensor {shape} is on {leaf.device}, others on {NAME}:0")


def _count(operation: torch._ops.OpOverload, name: str, leaves: list[Any], args: tuple) -> None:
    """Count the launches of an operation, and wait if it is one of those that CUDA waits for."""
    launches = 0 if name.startswith("empty") else 1
    if name.startswith(("_foreach_", "_fused_")):
        lists = [arg for arg in args if isinstance(arg, (list, tuple)) and arg and pretends(arg[0])]
        made = sum(str(returned.type) == "List[Tensor]" for returned in operation._schema.returns)
        depth = min(len(lists) + made, len(FOREACH_TENSORS))
        launches = math.ceil(len(lists[0]) / FOREACH_TENSORS[depth - 1])
    with _lock:
        _counts.kernels[name] += launches
    indices = []
    if "index_put" in name:  # PyTorch itself asks the device for the others' nonzero and copies
        indices = [index for index in args[1] if isinstance(index, Tensor)]
    if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
        wait("boolean indexing")
    for index in indices:
        if not pretends(index) and index.ndim:
            _count_copy("to the device", blocking=True)
    dynamic = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    if dynamic & {*operation.tags} and name != "index":
        wait({"_local_scalar_dense": "item"}.get(name, name))


def _count_copy(way: str, blocking: bool) -> None:
    manner = f"{'blocking' if blocking else 'non-blocking'} copy {way}"
    with _lock:
        _counts.copies[manner] += 1
    if blocking:
        wait(manner)


def copy(source: Tensor, destination: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy between tensors of which one or both are the device's."""
    with _lock:
        _counts.kernels["copy"] += 1
    if pretends(source) and not pretends(destination):
        if non_blocking:
            with _lock:
                _on_the_way.append((destination, to_cpu(source).clone()))
            _count_copy("to the CPU", blocking=False)
            return destination.fill_(RUBBISH)
        _count_copy("to the CPU", blocking=True)
    elif pretends(destination) and not pretends(source) and source.ndim:
        _count_copy("to the device", blocking=not non_blocking)
    to_cpu(destination).copy_(to_cpu(source))
    return destination


def _to_copy(
    x: Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    """Do as Tensor.to, whose own kernel asks for pinned memory."""
    memory_format = memory_format or torch.preserve_format
    return copy(
        x,
        torch.empty_like(x, dtype=dtype, device=device, memory_format=memory_format),
        non_blocking,
    )


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple:
    """Do as convolution_backward, which wants the shape of the bias too."""
    bias_sizes = [grad.shape[1]] if rest[-1][2] else None
    return run(aten.convolution_backward.default, grad, x, weight, bias_sizes, *rest)


def _autocast(operation: torch._ops.OpOverload) -> Callable:
    """Return the kernel that computes an operation in the precision of torch.autocast."""

    def lower(value: Any) -> Any:
        if pretends(value) and value.dtype == torch.float32:
            return value.to(torch.get_autocast_dtype(NAME))
        return value

    def kernel(*args: Any) -> Tensor:
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operation(*pytree.tree_map(lower, args))

    return kernel


class Event:
    """Stands for torch.Event, which cannot wait here, and for the one stream there is."""

    def __init__(self, *args: Any, **kwargs: Any): ...

    def record(self, stream: "Event | None" = None) -> None: ...

    def record_event(self, event: "Event | None" = None) -> "Event":
        return event or Event()

    def wait(self, stream: "Event | None" = None) -> None: ...

    def wait_event(self, event: "Event") -> None: ...

    def wait_stream(self, stream: "Event") -> None: ...

    def synchronize(self) -> None:
        wait("synchronize")

    def query(self) -> bool:
        return not _on_the_way

    def is_capturing(self) -> bool:  # torch.optim asks
        return False


class _Backend(_DummyBackendModule):
    """torch.pretend."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def is_bf16_supported(self) -> bool:  # its arithmetic is the CPU's
        return torch.cpu._is_avx512_bf16_supported()


def _register() -> None:
    """Tell the dispatcher: run() for all operations, and what needs more than that."""
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(run, "PrivateUse1")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    ours = torch.library.Library("aten", "IMPL")
    ours.impl("_copy_from", copy, "PrivateUse1")
    ours.impl("_to_copy", _to_copy, "PrivateUse1")
    ours.impl("convolution_backward_overrideable", _convolution_backward, "PrivateUse1")
    ours.impl(
        "convolution_overrideable",
        lambda *args: run(aten.convolution.default, *args),
        "PrivateUse1",
    )
    for full_name in torch._C._dispatch_get_all_op_names():  # which else run tensor by tensor
        name, _, overload = full_name.removeprefix("aten::").partition(".")
        if name.startswith("_foreach_") and not overload.endswith("out"):
            operation = getattr(getattr(aten, name), overload or "default")
            kernel = lambda *args, operation=operation, **kwargs: run(operation, *args, **kwargs)  # noqa: E731
            ours.impl(full_name.removeprefix("aten::"), kernel, "PrivateUse1")
    for full_name in LOWER_PRECISION:
        name, _, overload = full_name.partition(".")
        operation = getattr(getattr(aten, name), overload)
        ours.impl(operation, _autocast(operation), "AutocastPrivateUse1")
    _libraries.extend((everything, ours))


def install() -> None:
    """Make the device, for as long as this process lives."""
    _setup_privateuseone_for_python_backend(NAME, _Backend())
    _register()
    clone_storage = torch.UntypedStorage.clone

    def clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """Do for copy.deepcopy what would need an allocator."""
        if storage.device.type != NAME:
            return clone_storage(storage)
        return (
            torch.empty(0, dtype=torch.uint8, device=NAME).set_(storage).clone().untyped_storage()
        )

    torch.UntypedStorage.clone = clone
    torch.Event = Event
    torch.Tensor.pin_memory = lambda tensor, device=None: tensor
    torch.accelerator.synchronize = lambda device=None: wait("synchronize")
    torch.accelerator.current_stream = lambda device=None: Event()
    torch.accelerator.set_device_index = lambda device: None


def in_new_process(code: str, *arguments: object) -> tuple[int, str, str]:
    """Run code in a process that has the device; return its exit status, stdout and stderr.

    It is forked from a server that has imported PyTorch, and `arguments` are its sys.argv[1:].
    """
    context = multiprocessing.get_context("forkserver")
    answer, connection = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(connection, code, *map(str, arguments)))
    process.start()
    connection.close()  # so that the end of the process is the end of the pipe
    try:
        if not answer.poll(300):
            raise TimeoutError("no end after 300 seconds")
        return answer.recv()
    finally:
        process.kill()
        process.join()


def _answer(connection: Connection, code: str, *arguments: str) -> None:
    """Do in the new process what in_new_process is for."""
    status, printed, errors = 0, io.StringIO(), io.StringIO()
    torch.set_num_threads(1)
    install()
    sys.argv[1:] = arguments
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        try:
            exec(compile(code, "code", "exec"), {"__name__": "__main__"})
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            status = 1
            traceback.print_exc()
    connection.send((status, printed.getvalue(), errors.getvalue()))

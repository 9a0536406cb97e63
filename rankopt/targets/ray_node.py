"""``ray-node``: another target, measured on a node of a Ray cluster that carries a resource of its own.

Start Ray on the device with ``ray start --address=HEAD:6379 --resources='{"pi5": 1}'``; rankopt and what the inner
target needs are installed there, in the versions of this machine. A measurement takes the whole resource, so that there
is one at a time on the node.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from rankopt.errors import InputError, KilledError
from rankopt.measurement import Measurement
from rankopt.ray_environment import quiet
from rankopt.targets import make
from rankopt.targets.target import Subject, Target
from rankopt.targets.torch_cpu import first_line
from rankopt.timing import Effort

What = Literal["conditions", "measure", "peak_memory"]
_RAYS_OWN = ("CPU", "GPU", "memory", "object_store_memory")
_LOOK = 2.0  # seconds between two looks at whether the node is still there


class RayNode(Target):
    """A node of a Ray cluster.

    Attributes:
        resource: the custom resource that the node was started with, such as pi5.
        target: what is measured there: the name of another target.
        options: of that target.
        address: of the cluster: "auto", "HOST:PORT", "ray://HOST:PORT"; None for the one that runs here.
        wait_seconds: how long to wait for a node with the resource.
    """

    name: ClassVar[str] = "ray-node"
    resource: str = Field(min_length=1)
    target: str
    options: dict[str, Any] = Field(default_factory=dict)
    address: str | None = None
    wait_seconds: float = Field(60.0, ge=0, allow_inf_nan=False)
    _nodes: list[str] = PrivateAttr(default_factory=list)
    _unwanted: list[bool] = PrivateAttr(default_factory=list)

    @model_validator(mode="after")
    def _options_fit(self) -> RayNode:
        if self.resource in _RAYS_OWN or self.resource.startswith("node:"):
            raise ValueError(f"resource must be one of your own, such as pi5, got {self.resource!r}")
        if self.target == self.name:
            raise ValueError("target: needs the target that is measured on the node, got 'ray-node'")
        self._inner()
        return self

    @property
    def from_onnx(self) -> bool:
        """What the inner target says."""
        return self._inner().from_onnx

    @property
    def elsewhere(self) -> bool:
        """It is another machine, or (to try it out) taken for one."""
        return True

    @property
    def node(self) -> str | None:
        """The id that Ray gave to the node on which something was measured last."""
        return self._nodes[-1] if self._nodes else None

    def unwanted(self, so: bool) -> None:
        """See `Target.unwanted`; it is seen at the next look at the node."""
        self._unwanted[:] = [so]

    def conditions(self) -> dict[str, str]:
        """Those of the inner target on that node, and the resource."""
        return self._stated(self._on_node("conditions"))

    def measure(self, subjects: Sequence[Subject], effort: Effort = Effort()) -> list[Measurement]:
        """See `Target.measure`. What is shipped is the exported ONNX file where that is all the inner target needs."""
        if not subjects:
            return []
        found: list[Measurement] = self._on_node("measure", subjects, effort)
        return [replace(m, conditions=self._stated(m.conditions)) for m in found]

    def peak_memory(self, subject: Subject) -> Measurement:
        """As the inner target measures it, on the node."""
        found: Measurement = self._on_node("peak_memory", [subject])
        return replace(found, conditions=self._stated(found.conditions))

    def for_layers(self) -> Target:
        """The same node, with what the inner target measures layers on."""
        inner = self._inner()
        other = inner.for_layers()
        if other is inner:
            return self
        return self.model_copy(update={"target": other.name, "options": other.model_dump(exclude_none=True)})

    def _inner(self) -> Target:
        return make(self.target, self.options)

    def _stated(self, inner: Any) -> dict[str, str]:
        return {**inner, "target": self.name, "inner": self.target, "resource": self.resource}

    def _on_node(self, what: What, subjects: Sequence[Subject] = (), effort: Effort = Effort()) -> Any:
        """Run it there; errors of the node's target come back with their text."""
        ray = connected(self.address, f"target {self.called}")
        self._wait_for_node(ray)
        job = ray.remote(num_cpus=0, resources={self.resource: 1}, max_retries=0)(_run_there)
        modules = () if self.from_onnx else [m for s in subjects for m in s.module.modules()]
        try:
            with by_value(ray, {type(m).__module__ for m in modules}):
                shipped = ray.put([_shipped(s) for s in self._ready(subjects)])
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"target {self.called}: the model can't be sent to the node: {first_line(error.__cause__ or error)}"
            ) from error
        running = job.remote(self.target, self.options, what, shipped, effort)
        try:
            self._watch(ray, running)
            self._nodes[:], wrong, found = ray.get(running)
        except ray.exceptions.RayError as error:
            text = _cause(error)
            advice = "; are rankopt and the model's code installed there?" if "No module named" in text else ""
            gone = ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError
            kind = KilledError if isinstance(error, gone) else InputError
            raise kind(f"target {self.called}: the node with {self.resource} failed: {text}{advice}") from error
        except BaseException:  # also when interrupted: the node would go on measuring for nobody
            ray.cancel(running, force=True)
            raise
        if wrong is not None:
            raise InputError(wrong)
        return found

    def _ready(self, subjects: Sequence[Subject]) -> Sequence[Subject]:
        """Without the modules where the exported file is enough."""
        if not subjects or not self.from_onnx:
            return [replace(s, onnx=None) for s in subjects]
        from torch import nn

        from rankopt.onnx_file import exported

        models = exported(subjects)
        return [replace(s, module=nn.Module(), onnx=m) for s, m in zip(subjects, models, strict=True)]

    def _wait_for_node(self, ray: Any) -> None:
        until = time.monotonic() + self.wait_seconds
        while ray.cluster_resources().get(self.resource, 0) < 1:
            self._go_on()
            if time.monotonic() >= until:
                raise KilledError(
                    f"target {self.called}: no node of the Ray cluster has the resource {self.resource!r} (waited "
                    f"{self.wait_seconds:g} s); the cluster has {described(ray.cluster_resources())}. Start Ray there "
                    f"with --resources='{{\"{self.resource}\": 1}}'"
                )
            time.sleep(0.2)

    def _watch(self, ray: Any, running: Any) -> None:
        """Until it is done. A task whose node went away before it began would wait for ever."""
        while not ray.wait([running], timeout=_LOOK)[0]:
            self._go_on()
            self._wait_for_node(ray)

    def _go_on(self) -> None:
        if any(self._unwanted):
            raise InputError(f"target {self.called}: the measurement was given up")


def connected(address: str | None, where: str, **own: Any) -> Any:
    """Ray, connected as it is or now, and quiet.

    Args:
        address: of a cluster, "local" for one that is begun here and ends with this process, None for either.
        where: what errors begin with.
        own: further arguments of `ray.init`.

    Raises:
        InputError: no cluster answers there, or Ray is not installed.
    """
    quiet()
    try:
        import ray
    except ImportError:
        raise InputError(f"{where}: ray is not installed; pip install 'ray[tune]'") from None
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            place = address if address not in (None, "local") else "this machine"
            raise InputError(f"{where}: no Ray cluster answers at {place}: {first_line(error)}") from error
    return ray


def _run_there(*job: Any) -> Any:
    """On the node: its id as a list of one, and what `_run` gives."""
    import ray

    return [ray.get_runtime_context().get_node_id()], *_run(*job)


def _run(name: str, options: dict[str, Any], what: What, subjects: Sequence[Subject], effort: Effort) -> Any:
    """On the node: (None, what was found) or (what an `InputError` says, None)."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":  # Ray hides the GPUs from a task that asks for none
        del os.environ["CUDA_VISIBLE_DEVICES"]
    try:
        target = make(name, options)
        if what == "measure":
            return None, target.measure(subjects, effort)
        return None, target.conditions() if what == "conditions" else target.peak_memory(subjects[0])
    except InputError as error:
        return error.message, None


def _shipped(subject: Subject) -> Subject:
    """With everything on the CPU and inputs that are plain nests of tensors."""
    from rankopt.nest import mapped

    args, kwargs = mapped((subject.args, dict(subject.kwargs)), lambda tensor: tensor.detach().cpu())
    module = subject.module
    if any(v.device.type != "cpu" for v in (*module.parameters(), *module.buffers())):
        module = copy.deepcopy(module).cpu()
    return replace(subject, module=module, args=args, kwargs=kwargs)


@contextmanager
def by_value(ray: Any, places: Iterable[str]) -> Iterator[None]:
    """What is defined in these modules travels with what is sent, unless they are from an installed package."""
    known = ray.cloudpickle.list_registry_pickle_by_value()
    travelling = [sys.modules[p] for p in sorted(places) if p in sys.modules and p not in known and not _installed(p)]
    for module in travelling:
        ray.cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in travelling:
            ray.cloudpickle.unregister_pickle_by_value(module)


def _installed(place: str) -> bool:
    file = getattr(sys.modules[place], "__file__", None)
    if file is None or place.partition(".")[0] in ("rankopt", "torch", "__main__"):
        return True
    paths = sysconfig.get_paths()
    return any(Path(file).resolve().is_relative_to(Path(paths[p]).resolve()) for p in ("purelib", "platlib", "stdlib"))


def described(resources: dict[str, float]) -> str:
    """``8 CPU, 1 pi4``: what a cluster has, without Ray's bookkeeping."""
    shown = [f"{v:g} {k}" for k, v in sorted(resources.items()) if "memory" not in k and not k.startswith("node:")]
    return ", ".join(shown) or "none"


def _cause(error: BaseException) -> str:
    """What was raised on the node, without Ray's report around it."""
    inner = getattr(error, "cause", None)
    if isinstance(inner, Exception):
        return first_line(inner)
    lines = [line.strip() for line in str(error).splitlines() if "Error" in line]
    return (lines[-1] if lines else first_line(error))[:300]

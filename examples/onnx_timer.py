"""Time an ONNX model with ONNX Runtime, for rankopt's target ``command``. Needs onnxruntime and numpy, not rankopt.

    python onnx_timer.py model.onnx --runs 50 --threads 2

prints one line of JSON as its last one: ``{"times_ms": [...], "conditions": {...}}``. In a study file:

    targets:
      - target: command
        run: [python, examples/onnx_timer.py, "{onnx}", --inputs, "{inputs}", --runs, "{runs}"]

The same on a device that is reached by ssh: the file is copied there by a script of yours, which may be as short as

    #!/bin/sh
    # on_pi.sh MODEL RUNS
    scp -q "$1" pi@pi5:model.onnx && ssh pi@pi5 python3 onnx_timer.py model.onnx --runs "$2"

        run: [./on_pi.sh, "{onnx}", "{runs}"]
        stated: {device: "Raspberry Pi 5, 2.4 GHz"}
        device: pi5

A phone by adb: ``adb push "$1" /data/local/tmp/model.onnx`` and ``adb shell /data/local/tmp/timer ...``, with a timer
that was built for it. TensorRT: ``trtexec --onnx="$1" --iterations="$2" --exportTimes=times.json``, and a line of
Python that prints the ``latencyMs`` of each entry of times.json. Whatever it is, it warms up before it times, and it
prints the time of every single run: medians and quartiles are taken by rankopt.
"""

from __future__ import annotations

import argparse
import json
import platform
import time

import numpy as np
import onnxruntime

DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


def main() -> None:
    """Read the arguments, run the model, print the line."""
    parser = argparse.ArgumentParser(description="time an ONNX model with ONNX Runtime")
    parser.add_argument("model", help="path of the ONNX file")
    parser.add_argument("--inputs", help="path of an .npz file with input_0, input_1, ...; without it zeros are used")
    parser.add_argument("--runs", type=int, default=50, help="how many runs are timed")
    parser.add_argument("--warmup", type=int, default=10, help="how many runs come before them")
    parser.add_argument("--threads", type=int, default=1, help="threads within an operation")
    given = parser.parse_args()

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = given.threads, 1
    session = onnxruntime.InferenceSession(given.model, options, providers=["CPUExecutionProvider"])
    wanted = session.get_inputs()
    if given.inputs:
        with np.load(given.inputs, allow_pickle=False) as file:
            arrays = [file[f"input_{n}"] for n in range(len(wanted))]
    else:
        arrays = [np.zeros(entry.shape, DTYPES[entry.type]) for entry in wanted]
    feed = {entry.name: array for entry, array in zip(wanted, arrays, strict=True)}

    for _ in range(given.warmup):
        session.run(None, feed)
    times = []
    for _ in range(given.runs):
        start = time.perf_counter_ns()
        session.run(None, feed)
        times.append((time.perf_counter_ns() - start) / 1e6)
    conditions = {
        "runtime": f"onnxruntime {onnxruntime.__version__}",
        "threads": str(given.threads),
        "architecture": platform.machine(),
    }
    print(json.dumps({"times_ms": times, "conditions": conditions}))


if __name__ == "__main__":
    main()

"""All attention layers of a WikiText-2 network replaced by one method at a time, before and after a short recovery.

    python benchmarks/attention_text.py language_model --record
    python benchmarks/attention_text.py encoder --record

The networks are those of studies/wikitext2.py. Every method is given the same share of attention's MACs in every layer
(the table says what it then takes of the whole network), the language model's table of words the same share of its
parameters. Perplexities on validation text are there to choose by, those on test text to report. Latencies are medians
of the ratio to the dense network, whose calls take turns with theirs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "studies"))

import wikitext2  # type: ignore[import-not-found]
from machine import headed, write_record

from rankopt.batches import Batch, as_batches
from rankopt.bench import bench
from rankopt.calibration import CalibrationOptions, calibrate
from rankopt.cost import count
from rankopt.decompositions import method
from rankopt.divergence import Divergence
from rankopt.factors import Factors
from rankopt.layers import find_layers
from rankopt.plan import LayerChoice, Plan
from rankopt.rank_split import offered
from rankopt.recover import recover
from rankopt.surgery import apply
from rankopt.targets import make
from rankopt.timing import Effort

RECORDS = Path(__file__).parent.parent / "studies" / "records"
EXACT = ("attention_heads", "attention_apart", "attention_fused")
MIXERS = ("attention_nystrom", "attention_nmf", "attention_pnmf", "attention_ntf")
STEPS = 3  # iterations of the replacements that have some


class Study:
    """A network, its data, and what is known of its layers."""

    def __init__(self, which: str, windows: int) -> None:
        made, data = {
            "language_model": (wikitext2.language_model, wikitext2.text),
            "encoder": (wikitext2.encoder, wikitext2.masked_text),
        }[which]
        self.dense: nn.Module = made()
        self.data: dict[str, Any] = data(validation=windows, test=windows)
        x = self.data["calibration"][0]
        self.x = x[:1]
        self.layers = [la for la in find_layers(self.dense, self.x) if la.kind == "attention" or la.tied]
        with torch.no_grad():
            self.divergence = Divergence.of(self.dense(self.x))
        options = CalibrationOptions(fisher_samples=len(x), draws=1)
        gathered = calibrate(self.dense, self.layers, as_batches(x, batch_size=32), self.divergence, options)
        self.informed = Factors(self.dense, {name: found.metric for name, found in gathered.items()})
        self.blind = Factors(self.dense)
        for layer in self.layers:
            self.informed.keep(layer, gathered[layer.name].fisher)

    def plan(self, name: str, share: float, kind: str, factors: Factors) -> Plan | None:
        """This method at this share in every layer of the kind; None where nothing is as cheap."""
        way, choices = method(name), {}
        for layer in self.layers:
            if layer.kind != kind:
                continue
            quantity = "macs" if kind == "attention" else "params"
            full = [factors.full(layer, name)]
            found = [r for r in offered(way, layer, full, [share], 1, quantity) if r.get("steps", STEPS) == STEPS]
            if not found:
                return None
            choices[layer.name] = LayerChoice(name, found[0])
        return Plan(choices)

    def perplexity(self, net: nn.Module, part: str) -> float:
        """Over the windows of that part."""
        x, y = self.data[part]
        found: float = wikitext2.perplexity(net, [Batch((x,), {}, y)])
        return found

    def recovered(self, net: nn.Module, plan: Plan, steps: int) -> nn.Module:
        """Trained towards the dense network on training text."""
        x, y = self.data["train"]
        batches = as_batches((x[:2048], y[:2048]), batch_size=16)
        options = {"steps": steps, "batch": 16}
        return recover(net, self.dense, batches, options=options, plan=plan, divergence=self.divergence).model


def cases(which: str) -> Iterator[tuple[str, float, str, bool]]:
    """Method, share, kind of layer, whether the data are known."""
    if which == "encoder":
        for name, share in (("attention_heads", 0.6), ("attention_nystrom", 0.9), *((m, 0.6) for m in MIXERS[1:])):
            yield name, share, "attention", True
        return
    for share in (0.5, 0.35):
        for name in EXACT:
            yield from ((name, share, "attention", known) for known in (True, False))
    for name in ("svd", "tt_matrix"):
        yield name, 0.5, "embedding", True


def main() -> None:
    """Measure all cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", choices=("language_model", "encoder"))
    parser.add_argument("--steps", type=int, default=40, help="of recovery, 16 windows each")
    parser.add_argument("--windows", type=int, default=128, help="of validation and of test text")
    parser.add_argument("--seconds", type=float, default=0.5, help="of measuring latency, for each network")
    parser.add_argument("--memory", action="store_true", help="measure peak memory too, by processes of its own")
    parser.add_argument("--record", action="store_true", help="write the record")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    study, start = Study(given.which, given.windows), time.perf_counter()
    whole = count(study.dense, study.x)
    both = ("validation", "test")
    dense = [study.perplexity(study.dense, part) for part in both]
    rows = [["dense", "", "100 %", "100 %", f"{dense[0]:.2f}", f"{dense[1]:.2f}", "", ""]]
    nets: dict[str, nn.Module] = {}
    for name, share, kind, known in cases(given.which):
        factors = study.informed if known else study.blind
        plan = study.plan(name, share, kind, factors)
        label = f"`{name}`" + ("" if known else ", weights alone")
        if plan is None:
            rows.append([label, f"{share:.0%}", "nothing is as cheap", *[""] * 5])
            continue
        net = apply(study.dense, plan, factors)
        cost = count(net, study.x)
        cells = [f"{cost.macs / whole.macs:.1%}", f"{cost.params / whole.params:.1%}"]
        cells += [f"{study.perplexity(net, part):.2f}" for part in both]
        after = study.recovered(net, plan, given.steps) if known and given.steps else None
        cells += ["" if after is None else f"{study.perplexity(after, part):.2f}" for part in both]
        rows.append([label, f"{share:.0%}", *cells])
        print(f"{time.perf_counter() - start:.0f} s", *rows[-1], sep="  ", flush=True)
        if known:
            nets[f"{label} {share:.0%}"] = net
    lines = headed(
        f"Attention in a small {given.which.replace('_', ' ')}, one method at a time",
        f"studies/wikitext2.py: {whole.params / 1e6:.2f} M parameters, {whole.macs / 1e6:.1f} M MACs a window of "
        f"{wikitext2.CONTEXT} words, of which attention takes "
        f"{sum(la.macs for la in study.layers if la.kind == 'attention') / whole.macs:.0%}; a vocabulary of "
        f"{wikitext2.WORDS:,} words. Perplexity on {given.windows} windows, those of masked words for the encoder; "
        f"recovery by {given.steps} steps of 16 windows. The share is that of the replaced layers' MACs, or of the "
        "table's parameters for `svd` and `tt_matrix`.",
    )
    heads = ["method", "share", "MACs", "parameters", "validation", "test", "validation, recovered", "test, recovered"]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    effort = Effort(seconds=given.seconds, repeats=0)
    on = [make("torch", {"threads": 1})]
    measured = bench(study.dense, nets, (study.x,), targets=on, effort=effort, memory=given.memory)
    heads = ["network", "latency", "quartiles", *["memory, MiB"] * given.memory, "noisy"]
    told = "Latency of one window in PyTorch, as a ratio to the dense network's (quartiles)"
    lines += ["", f"{told}, and peak memory:" if given.memory else f"{told}:", ""]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in measured:
        ratio, low, high = (f"{row[f'latency_kept{q}']:.2f}" for q in ("", "_low", "_high"))
        held = [f"{row['memory_mib']:.1f}"] if given.memory else []
        lines.append(f"| {' | '.join([row['model'], ratio, f'{low} to {high}', *held, row['noisy'] or ''])} |")
    write_record(lines, RECORDS / f"attention_{given.which}.md" if given.record else None)


if __name__ == "__main__":
    main()

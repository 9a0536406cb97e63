"""Parameters and multiply-accumulates of the reference capsule layer (1152 × 8 to 10 × 16, three iterations) by method.

For every method some ranks, with the multiply-accumulates of the cheapest order, and of forming the votes first and
routing on them, as the dense layer does. Nothing is run: costs follow from sizes.

    python benchmarks/capsule_orders.py --record studies/records/capsule_orders.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rankopt.decompositions import method
from rankopt.layer_spec import Call, LayerSpec
from rankopt.nn.contraction import cheapest
from rankopt.nn.factored_capsules import routing_orders

IN, OUT, D_OUT, D_IN, ITERATIONS, TYPES = 1152, 10, 16, 8, 3, 32
DENSE = IN * OUT * D_OUT * (D_IN + 2 * ITERATIONS - 1)
RANKS: dict[str, list[dict[str, int]]] = {
    "caps_svd": [{"rank": 1}, {"rank": 4}, {"rank": 8}],
    "caps_tucker": [
        {"rank_in": 1, "rank_out": 10},
        {"rank_in": 3, "rank_out": 10},
        {"rank_in": 6, "rank_out": 2},
        {"rank_in": 12, "rank_out": 10},
    ],
    "caps_cp": [{"rank": 2}, {"rank": 6}, {"rank": 24}, {"rank": 80}],
    "caps_tt": [
        {"rank_1": 2, "rank_2": 3, "rank_3": 3},
        {"rank_1": 8, "rank_2": 8, "rank_3": 16},
        {"rank_1": 8, "rank_2": 40, "rank_3": 16},
    ],
    "caps_shared": [{"parts": 1}, {"parts": 6}, {"parts": 36}],
    "caps_routing": [{"iterations": 1}, {"iterations": 2}, {"iterations": 3}],
}


def layer() -> LayerSpec:
    """The digit capsules of Sabour et al., one image."""
    facts = {"out_caps": OUT, "d_out": D_OUT, "iterations": ITERATIONS, "types": TYPES}
    return LayerSpec(
        name="digits",
        kind="capsules",
        in_channels=IN * D_IN,
        out_channels=IN * OUT * D_OUT,
        groups=IN,
        bias=False,
        calls=(Call(1, (), (), macs=DENSE),),
        facts=tuple(facts.items()),
    )


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    spec = layer()
    lines = [
        "| method | ranks | parameters kept | MACs kept | MACs kept if the votes are formed first | multiplied once |",
        "|---|---|---|---|---|---|",
    ]
    for name, several in RANKS.items():
        way = method(name)
        for ranks in several:
            given = {"iterations": ITERATIONS, **ranks}
            network, sizes = way.network(spec), way.sizes(spec, given)  # type: ignore[attr-defined]
            orders = routing_orders(network, sizes, given["iterations"])
            votes = cheapest([f"n{network.below}e", *network.factors], [0], f"n{network.below}jd", {**sizes, "n": 1})
            routing = (2 * given["iterations"] - 1) * IN * OUT * D_OUT
            formed = (int(votes.macs) + routing) / DENSE
            once = ", ".join(network.factors[n] for n in orders.once) or "nothing"
            shown = ", ".join(f"{key} {value}" for key, value in ranks.items())
            share = way.params(spec, given) / spec.params
            lines.append(f"| `{name}` | {shown} | {share:.2%} | {orders.macs / DENSE:.3f} | {formed:.3f} | {once} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.record:
        head = (
            "# Parameters and MACs of the reference capsule layer\n\n    python benchmarks/capsule_orders.py --record "
        )
        dense = f"\n\nDense: {spec.params:,} parameters, {DENSE:,} MACs an image; routing is {5 / 13:.0%} of them.\n\n"
        options.record.write_text(f"{head}{options.record}{dense}{text}")


if __name__ == "__main__":
    main()

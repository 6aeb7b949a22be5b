"""The pages for readers hold what the records say: regenerated here, and compared."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from snn_tf import comparison
from snn_tf.results import COMPRESSED, DENSE, SNN, difference, read

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "ablation": ROOT / "docs" / "ablation.md",
    "headline": ROOT / "README.md",
    "others": ROOT / "docs" / "ablation.md",
}
README = PAGES["headline"].read_text()
RECORDED = {
    f"{study}/{group.name}": group for study in PAGES for group in read(ROOT / "results" / study)
}
OPENING = {
    "dense ANN": ("dense", "dense_ann"),
    "dense SNN, T = 5 time steps": ("dense", "trained_snn"),
    "compressed ANN": ("irregular_0.029", "compressed_ann"),
    "compressed SNN, T = 5": ("irregular_0.029", "trained_snn"),
    "compressed ANN, activations of five levels": ("irregular_0.029_levels", "compressed_ann"),
    "its SNN, T = 5": ("irregular_0.029_levels", "trained_snn"),
    "its SNN, T = 10": ("irregular_0.029_levels_t10", "trained_snn"),
    "dense ANN, trained longer": ("longer_dense", "dense_ann"),
    "SNN of this dense ANN, T = 5": ("longer_dense", "trained_snn"),
    "compressed ANN of five levels, trained longer": ("longer_irregular_0.029_levels", "compressed_ann"),
    "SNN of this compressed ANN, T = 5": ("longer_irregular_0.029_levels", "trained_snn"),
}


def test_readme_opens_with_the_figures_of_the_records():
    opening = README.partition("make quickstart")[0]
    expected = []
    for label, (name, which) in OPENING.items():
        (row,) = RECORDED[f"headline/{name}"].rows
        network, dense = row.network(which), row.network("dense_ann")
        ratio = dense["energy_pj"]["fp32_45nm"] / network["energy_pj"]["fp32_45nm"]
        expected.append(f"| {label} | {100 * network['test_accuracy']:.2f} % | {ratio:.1f}× |")
    assert [line for line in opening.splitlines() if " % | " in line] == expected


def test_readme_opens_with_the_density_and_steps_of_the_records():
    opening = " ".join(README.partition("make quickstart")[0].split())
    for label, (name, which) in OPENING.items():
        (row,) = RECORDED[f"headline/{name}"].rows
        steps = re.search(r"T = (\d+)", label)
        assert not steps or int(steps[1]) == row.record["timesteps"]
        if row.config["method"] != "dense":
            found = row.network(which)
            kept = f"{100 * found['density']:.1f} % are kept ({found['compression']:.1f}× compression)"
            assert kept in opening


# What the pages conclude from: how far the first row's network is ahead of the second's.
CONCLUSIONS = [
    ("headline", "irregular_0.029", COMPRESSED, "dense", DENSE),
    ("headline", "dense", SNN, "irregular_0.029", SNN),
    ("headline", "dense", DENSE, "irregular_0.029", SNN),
    ("headline", "dense", DENSE, "dense", SNN),
    ("headline", "dense", DENSE, "irregular_0.029_levels", SNN),
    ("headline", "dense", DENSE, "irregular_0.029_levels_t10", SNN),
    ("headline", "irregular_0.029_levels", COMPRESSED, "irregular_0.029_levels", SNN),
    ("headline", "irregular_0.029_levels", SNN, "irregular_0.029", SNN),
    ("headline", "irregular_0.029_levels_t10", SNN, "irregular_0.029_levels_t10", COMPRESSED),
    ("headline", "irregular_0.029_levels_beta100", COMPRESSED, "irregular_0.029_levels", COMPRESSED),
    ("headline", "irregular_0.029_levels_beta100", SNN, "irregular_0.029_levels", SNN),
    ("headline", "dense", SNN, "channel_0.5", SNN),
    ("headline", "longer_irregular_0.029_levels", DENSE, "longer_irregular_0.029_levels", SNN),
    ("headline", "longer_irregular_0.029_levels", COMPRESSED, "longer_irregular_0.029_levels", SNN),
    ("headline", "longer_irregular_0.029_levels", DENSE, "longer_irregular_0.029_levels", COMPRESSED),
    ("headline", "longer_irregular_0.029_levels", SNN, "irregular_0.029_levels_beta100", SNN),
    ("headline", "longer_irregular_0.029_levels", DENSE, "dense", DENSE),
    ("headline", "longer_irregular_0.029_levels", SNN, "longer_dense", SNN),
    ("headline", "longer_dense", SNN, "dense", SNN),
    ("headline", "longer_dense", DENSE, "longer_dense", SNN),
    ("headline", "plain_dense", DENSE, "plain_dense", SNN),
    ("ablation", "attention_cubic_0.05", COMPRESSED, "magnitude_0.05", COMPRESSED),
    ("ablation", "attention_cubic_0.05", SNN, "magnitude_0.05", SNN),
    ("ablation", "magnitude_0.05", COMPRESSED, "attention_sparing_0.05", COMPRESSED),
    ("ablation", "magnitude_0.05", SNN, "attention_sparing_0.05", SNN),
    ("ablation", "magnitude_0.05", COMPRESSED, "fisher_sparing_0.05", COMPRESSED),
    ("ablation", "magnitude_0.05", SNN, "fisher_sparing_0.05", SNN),
    ("ablation", "attention_cubic_0.05_beta100", COMPRESSED, "magnitude_0.05_beta100", COMPRESSED),
    ("ablation", "attention_cubic_0.05_beta100", SNN, "magnitude_0.05_beta100", SNN),
    ("ablation", "attention_cubic_0.05_beta100", COMPRESSED, "no_attention_cubic_0.05", COMPRESSED),
    ("ablation", "attention_cubic_0.05_beta100", SNN, "no_attention_cubic_0.05", SNN),
    ("ablation", "magnitude_0.05_beta100", COMPRESSED, "magnitude_no_attention_0.05", COMPRESSED),
    ("ablation", "magnitude_0.05_beta100", SNN, "magnitude_no_attention_0.05", SNN),
    ("ablation", "attention_cubic_0.05_beta100_fixed_v_th", SNN, "attention_cubic_0.05_beta100", SNN),
    ("ablation", "attention_cubic_0.05_beta100_fixed_leak", SNN, "attention_cubic_0.05_beta100", SNN),
    ("ablation", "attention_cubic_0.05_beta100_distilled", SNN, "attention_cubic_0.05_beta100", SNN),
    ("others", "resnet12_dense", DENSE, "resnet12_irregular_0.05", COMPRESSED),
    ("others", "resnet12_dense", SNN, "resnet12_irregular_0.05", SNN),
    ("others", "resnet12_dense", DENSE, "resnet12_dense", SNN),
    ("others", "resnet12_irregular_0.05_levels", SNN, "resnet12_irregular_0.05", SNN),
    ("others", "resnet12_irregular_0.05_levels", SNN, "resnet12_dense", SNN),
    ("others", "resnet12_irregular_0.05_levels", COMPRESSED, "resnet12_irregular_0.05_levels", SNN),
    ("others", "resnet12_irregular_0.05", COMPRESSED, "resnet12_irregular_0.05_levels", COMPRESSED),
    ("others", "tiny_imagenet_irregular_0.05", COMPRESSED, "tiny_imagenet_dense", DENSE),
    ("others", "tiny_imagenet_irregular_0.05", SNN, "tiny_imagenet_dense", SNN),
    ("others", "tiny_imagenet_dense", DENSE, "tiny_imagenet_dense", SNN),
    ("others", "tiny_imagenet_irregular_0.05", COMPRESSED, "tiny_imagenet_irregular_0.05", SNN),
]


@pytest.mark.parametrize(("study", "first", "which", "second", "other"), CONCLUSIONS)
def test_page_concludes_from_the_records_as_they_are(study, first, which, second, other):
    page = " ".join(PAGES[study].read_text().split()).replace(" points [", " [")
    groups = (RECORDED[f"{study}/{name}"] for name in (first, second))
    ahead = difference(next(groups), which, next(groups), other)
    spread = f"± {100 * ahead.deviation:.2f}" if ahead.deviation else ""
    if ahead.interval:
        low, high = (100 * bound for bound in ahead.interval)
        spread = f"[{low:.2f}, {high:.2f}]"
    assert f"{100 * ahead.mean:.2f} {spread}" in page


@pytest.mark.parametrize(
    ("study", "name", "sentence"),
    [
        ("headline", "plain_dense", "from a conversion at {:.2f} %"),
        ("headline", "longer_dense", "begins as converted at {:.2f} % instead of"),
        ("headline", "dense", "% instead of {:.2f} and"),
        ("others", "resnet12_dense", "as converted it is at {:.1f} %"),
    ],
)
def test_page_says_what_conversion_alone_reached(study, name, sentence):
    (row,) = RECORDED[f"{study}/{name}"].rows
    accuracy = 100 * row.network("converted_snn")["test_accuracy"]
    assert sentence.format(accuracy) in " ".join(PAGES[study].read_text().split())


@pytest.mark.parametrize("study", PAGES)
def test_pages_are_what_report_writes(study, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "plot", lambda *arguments: None)
    results = shutil.copytree(ROOT / "results" / study, tmp_path / study)
    headers = shutil.copytree(ROOT / "flags" / study, tmp_path / "flags")
    page = Path(shutil.copy(PAGES[study], tmp_path))
    comparison.write(results)
    comparison.put_table(page, results)
    comparison.put_headers(headers, results)
    assert page.read_text() == PAGES[study].read_text()
    assert (results / "README.md").read_text() == (ROOT / "results" / study / "README.md").read_text()
    for written in headers.glob("*.flags"):
        assert written.read_text() == (ROOT / "flags" / study / written.name).read_text(), written.name


def test_masks_beside_each_other_are_those_of_the_records():
    """The README's table of VGG9: three seeds of every row."""
    section = README.partition("### VGG9")[2].partition("###")[0]
    expected, found = [], re.findall(r"^\| .* \| `.*$", section, re.MULTILINE)
    for line in found:
        label, name = re.match(r"\| (.*) \| `([^`]+)`", line).groups()
        group = RECORDED[f"ablation/{name}"]
        accuracies = [
            100 * np.array(group.values(which, "test_accuracy"))
            for which in ("compressed_ann", "trained_snn")
        ]
        shown = [f"{values.mean():.2f} ± {values.std(ddof=1):.2f}" for values in accuracies]
        kept = np.mean(group.values("compressed_ann", "mac_density"))
        expected.append(f"| {label} | `{name}` | {shown[0]} | {shown[1]} | {kept:.3f} |")
        assert len(group.rows) == 3
    assert len(expected) > 5
    assert found == expected


def skipping_zeros(dense: dict, compressed: dict, snn: dict) -> list[str]:
    """What ANNs whose zeros cost nothing need over what the SNN does, where the record has it."""
    variants = [ann["conventions"]["padded"]["variants"] for ann in (dense, compressed)]
    if "zeros_skipped" not in variants[0]:
        return ["", ""]
    energies = [found["zeros_skipped"]["energy_pj"]["fp32_45nm"] for found in variants]
    return [f"{energy / snn['energy_pj']['fp32_45nm']:.1f}×" for energy in energies]


def test_other_counts_of_energy_are_those_of_the_records():
    """The README's second table of VGG16: by other counts than the default."""
    section = README.partition("By other counts (")[2].partition("###")[0]
    expected = []
    for line in re.findall(r"^\| `.*$", section, re.MULTILINE):
        name = re.match(r"\| `([^`]+)`", line)[1]
        (row,) = RECORDED[f"headline/{name}"].rows
        dense, compressed, snn = map(row.network, ("dense_ann", "compressed_ann", "trained_snn"))
        reference = dense["energy_pj"]["fp32_45nm"]
        updated = snn["energy_pj"]["fp32_45nm"] + 4.6 * snn["neuron_updates"]
        others = [
            dense["conventions"][convention]["variants"]["default"]["energy_pj"][model] / energy
            for convention, facts in snn["conventions"].items()
            for variant, counts in facts["variants"].items()
            for model, energy in counts["energy_pj"].items()
            if (convention, variant, model) != ("padded", "default", "fp32_45nm")
        ]
        ratios = [
            reference / compressed["energy_pj"]["fp32_45nm"],
            reference / snn["energy_pj"]["fp32_45nm"],
            reference / updated,
        ]
        shown = [f"`{name}`", *(f"{ratio:.1f}×" for ratio in ratios)]
        shown += [f"{min(others):.1f}× to {max(others):.1f}×", *skipping_zeros(dense, compressed, snn)]
        expected.append("| " + " | ".join(shown) + " |")
    assert len(expected) > 4
    assert re.findall(r"^\| `.*$", section, re.MULTILINE) == expected

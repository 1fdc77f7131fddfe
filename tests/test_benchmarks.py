"""The benchmarks run to their end, small, and print what `make bench` promises; their figures mean nothing here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# About 30 s each on a quiet machine; they start several processes that import torch and diffusers.
pytestmark = pytest.mark.timeout(900)

FOLDER = Path(__file__).parent / "benchmarks"


def figures_of(script, *options):
    done = subprocess.run([sys.executable, FOLDER / script, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_engine_against_diffusers():
    figures = figures_of("engine.py", "--quick", "--pairs", "1")
    assert set(figures["wall_ratio"]) == set(figures["flops_ratio"]) == {"unchunked", "8", "4", "2"}
    assert figures["evaluations"]["ours"] == figures["evaluations"]["minimum"]
    # Counted, not timed. At this size the prompt's keys and values, which ours makes once, weigh more than they do.
    assert 1 < figures["flops_ratio"]["unchunked"] < figures["flops_ratio"]["4"] < figures["flops_ratio"]["2"]
    assert figures["memory_growth"] > 0


def test_workers_with_few_rows():
    figures = figures_of("workers.py", "--rows", "4", "--generate", "0.02", "--decode", "0.01", "--encode", "0.01")
    assert 0 < figures["device_busy"] <= 1
    assert figures["speedup_2_workers"] > 0


def test_profile_finds_the_unets_work():
    figures = figures_of("engine.py", "--quick", "--profile")
    profile = figures["profile_tiny_s"]
    assert {"UNet", "VAE", "text encoder", "loop"} <= set(profile)
    assert {"convolution", "attention", "linear", "host"} <= set(profile["UNet"])
    assert sum(profile["UNet"].values()) > sum(profile["loop"].values())


def test_gpu_script_on_small_models():
    figures = figures_of("gpu.py", "--small", "--pairs", "1")
    for model in ("sd15_32", "sdxl_32"):
        for setting in ("8_unchunked", "24_chunks_of_2"):
            assert figures["gpu"][model][setting]["wall_ratio"] > 0
            assert 0 < figures["gpu"][model][setting]["flops_utilisation"] < 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/usr/lib/postgresql").is_dir(), reason="no PostgreSQL server here")
def test_scale_with_few_rows():
    figures = figures_of("scale.py", "--task-rows", "10", "--rows", "60")
    assert figures["tasks"]["message"] == "10 rendered"
    assert figures["tasks"]["task_runs"] == 40  # a row's and its three stages'
    assert figures["shards"]["message"] == "60 rendered"
    assert figures["rerun"]["message"] == "60 done before"
    assert figures["shards"]["cpu_ms_a_row"]["all"] > 0
    assert set(figures["ui_ms"]) >= {"run", "graph", "task_runs_page", "artifacts"}

"""Combined adapters against the formulas, computed here from dense matrices; read back by stock PEFT."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from fourbit.errors import ConfigError, FourBitError, ModelError
from fourbit.model.combinable import BY_SVD, COMBINATION_TYPES
from fourbit.model.combine import combine
from tests.model.conftest import Make
from tests.tiny import llama

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

PATTERNS: dict[str, Any] = {
    "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 6},
    "alpha_pattern": {"q_proj": 3, "up_proj": 40},
}


def layer_parts(folder: Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A, B in fp64 and the scaling of each layer, as stock PEFT has them once it has loaded the adapter."""
    model = PeftModel.from_pretrained(llama(tied=False), str(folder))
    parts = {}
    for name, module in model.get_base_model().named_modules():
        factors = [getattr(module, f"lora_{part}", {}) for part in "AB"]
        if all("default" in factor for factor in factors):
            a, b = (factor["default"].weight.detach().double() for factor in factors)
            parts[name] = (a, b, float(module.scaling["default"]))
    return parts


def deltas(folder: Path) -> dict[str, Tensor]:
    return {name: scaling * b @ a for name, (a, b, scaling) in layer_parts(folder).items()}


def weighted_sum(folders: list[Path], weights: list[float]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for name, delta in deltas(folder).items():
            total[name] = total.get(name, torch.zeros_like(delta)) + weight * delta
    return total


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-5, atol=1e-6)


def pruned(delta: Tensor, density: float) -> Tensor:
    keep = int(density * delta.numel())
    if keep == 0:
        return torch.zeros_like(delta)
    threshold = delta.abs().flatten().sort(descending=True).values[keep - 1]
    return torch.where(delta.abs() >= threshold, delta, 0.0)


def elected(parts: list[Tensor], weights: list[float], method: str) -> Tensor:
    """Disjoint mean of those whose sign is the majority's (TIES, section 4)."""
    stacked = torch.stack(parts)
    votes = stacked.sum(0) if method == "total" else stacked.sign().sum(0)
    majority = torch.where(votes >= 0, 1.0, -1.0).double()
    agrees = stacked.sign() == majority
    weighted = stacked * torch.tensor(weights, dtype=torch.float64)[:, None, None] * agrees
    return weighted.sum(0) / agrees.sum(0).clamp(min=1)


def nearest_of_rank(delta: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


ADAPTERS: list[dict[str, Any]] = [
    {},
    {"r": 4, "lora_alpha": 3, "use_rslora": True},
    {"r": 4, "lora_alpha": 5, "alpha_pattern": PATTERNS["alpha_pattern"]},
]


class TestExact:
    """cat and svd of sufficient rank are the weighted sum, whatever the adapters are."""

    @pytest.mark.parametrize("combination_type", ["cat", "svd"])
    @pytest.mark.parametrize(
        "second",
        [
            {"r": 4},
            {"r": 8, "lora_alpha": 4, "use_rslora": True},
            {**PATTERNS},
            {**PATTERNS, "use_rslora": True},
            {"target_modules": ["q_proj", "v_proj"]},
            {"target_modules": r".*layers\.1\..*_proj"},
            {"dtype": torch.bfloat16},
        ],
        ids=["same", "rslora", "patterns", "patterns_rslora", "fewer", "expression", "bfloat16"],
    )
    @pytest.mark.parametrize("turned", [False, True])
    def test_the_weighted_sum(
        self, make: Make, tmp_path: Path, second: dict[str, Any], combination_type: str, turned: bool
    ) -> None:
        folders, weights = [make("a"), make("b", **second)], [0.7, -0.4]
        if turned:
            folders.reverse()
        options = {"rank": 16} if combination_type == "svd" else {}
        pairs = list(zip(folders, weights, strict=True))
        result = combine(pairs, tmp_path / "out", combination_type, **options)
        assert_same(deltas(tmp_path / "out"), weighted_sum(folders, weights))
        assert result.deviation < 1e-6
        assert result.layers == len(deltas(tmp_path / "out"))
        stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
        assert {tensor.shape[0] for name, tensor in stored.items() if "lora_A" in name} == {result.rank}
        assert result.parameters == sum(tensor.numel() for tensor in stored.values())

    def test_three(self, make: Make, tmp_path: Path) -> None:
        folders = [make(name, **options) for name, options in zip("abc", ADAPTERS, strict=True)]
        result = combine([(folder, 1 / 3) for folder in folders], tmp_path / "out", "cat")
        assert result.rank == 12
        assert_same(deltas(tmp_path / "out"), weighted_sum(folders, [1 / 3] * 3))

    def test_embeddings(self, make: Make, tmp_path: Path) -> None:
        targets = ["embed_tokens", "q_proj"]
        folders = [make(name, target_modules=targets) for name in "ab"]
        combine([(folders[0], 0.5), (folders[1], 2.0)], tmp_path / "out", "cat")
        models = [PeftModel.from_pretrained(llama(tied=False), str(f)) for f in [*folders, tmp_path / "out"]]
        found = [model.get_input_embeddings().get_delta_weight("default") for model in models]
        torch.testing.assert_close(found[2], 0.5 * found[0] + 2.0 * found[1], rtol=1e-5, atol=1e-6)


class TestFormulas:
    def test_svd_is_the_nearest_matrix_of_a_rank(self, make: Make, tmp_path: Path) -> None:
        folders = [make(name, **options) for name, options in zip("ab", ADAPTERS, strict=False)]
        result = combine([(folders[0], 0.7), (folders[1], 0.3)], tmp_path / "out", "svd", rank=3)
        wanted = weighted_sum(folders, [0.7, 0.3])
        nearest = {name: nearest_of_rank(delta, 3) for name, delta in wanted.items()}
        assert_same(deltas(tmp_path / "out"), nearest)
        error = sum(float((nearest[name] - wanted[name]).square().sum()) for name in wanted)
        total = sum(float(delta.square().sum()) for delta in wanted.values())
        assert result.deviation == pytest.approx(math.sqrt(error / total), rel=1e-4)

    def test_svd_by_default_keeps_the_largest_rank(self, make: Make, tmp_path: Path) -> None:
        pairs = [(make("a", r=3), 1.0), (make("b", r=5), 1.0)]
        assert combine(pairs, tmp_path / "out", "svd").rank == 5

    def test_a_rank_above_the_layers(self, make: Make, tmp_path: Path) -> None:
        """k_proj is 32 x 64: it has no more than 32 singular values, and is filled up."""
        folders = [make("a"), make("b")]
        combine([(folder, 1.0) for folder in folders], tmp_path / "out", "ties_svd", rank=40, density=1.0)
        assert {a.shape[0] for a, _, _ in layer_parts(tmp_path / "out").values()} == {40}

    @pytest.mark.parametrize("combination_type", ["linear", "magnitude_prune", "ties"])
    def test_by_factor(self, make: Make, tmp_path: Path, combination_type: str) -> None:
        folders = [make(name, **options) for name, options in zip("abc", ADAPTERS, strict=True)]
        weights, options = [0.7, 0.3, -0.2], {} if combination_type == "linear" else {"density": 0.6}
        pairs = list(zip(folders, weights, strict=True))
        combine(pairs, tmp_path / "out", combination_type, **options)
        parts = [layer_parts(folder) for folder in folders]
        for name, (a, b, scaling) in layer_parts(tmp_path / "out").items():
            assert scaling == 1.0
            strengths = [weight * part[name][2] for weight, part in zip(weights, parts, strict=True)]
            roots = [math.sqrt(abs(strength)) for strength in strengths]
            signed = [math.copysign(root, strength) for root, strength in zip(roots, strengths, strict=True)]
            for factor, found, scales in ((0, a, signed), (1, b, roots)):
                inputs = [part[name][factor] for part in parts]
                if combination_type != "linear":
                    inputs = [pruned(tensor, 0.6) for tensor in inputs]
                if combination_type == "ties":
                    expected = elected(inputs, scales, "total")
                else:
                    expected = sum(scale * x for scale, x in zip(scales, inputs, strict=True))
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("majority", ["total", "frequency"])
    @pytest.mark.parametrize("combination_type", ["ties_svd", "magnitude_prune_svd"])
    def test_by_svd(self, make: Make, tmp_path: Path, combination_type: str, majority: str) -> None:
        folders = [make("a"), make("b", r=8, lora_alpha=4, use_rslora=True)]
        weights = [0.7, 0.3]
        options = {"majority_sign_method": majority} if "ties" in combination_type else {}
        pairs = list(zip(folders, weights, strict=True))
        combine(pairs, tmp_path / "out", combination_type, rank=20, density=0.5, **options)
        inputs = [deltas(folder) for folder in folders]
        for name, found in deltas(tmp_path / "out").items():
            kept = [pruned(delta[name], 0.5) for delta in inputs]
            if "ties" in combination_type:
                expected = elected(kept, weights, majority)
            else:
                expected = weights[0] * kept[0] + weights[1] * kept[1]
            torch.testing.assert_close(found, nearest_of_rank(expected, 20), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("combination_type", [name for name in COMBINATION_TYPES if "dare" in name])
    def test_dare(self, make: Make, tmp_path: Path, combination_type: str) -> None:
        """Random, but the same from a seed; and what is kept is rescaled so that the mean stays."""
        pairs = [(make("a"), 0.7), (make("b"), 0.3)]
        for number, seed in enumerate((1, 1, 2)):
            state = torch.get_rng_state()
            combine(pairs, tmp_path / str(number), combination_type, density=0.5, seed=seed)
            assert torch.equal(torch.get_rng_state(), state)
        found = [load_file(tmp_path / str(n) / "adapter_model.safetensors") for n in range(3)]
        assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
        assert not all(torch.equal(tensor, found[2][name]) for name, tensor in found[0].items())
        if combination_type == "dare_linear":
            a = load_file(pairs[0][0] / "adapter_model.safetensors")
            b = load_file(pairs[1][0] / "adapter_model.safetensors")
            name = next(iter(found[0]))
            root = [math.sqrt(weight * 2.0) for _, weight in pairs]  # the scaling is 8 / 4
            candidates = torch.stack(
                [x * root[0] * a[name] + y * root[1] * b[name] for x in (0.0, 2.0) for y in (0.0, 2.0)]
            )
            assert ((candidates - found[0][name]).abs().amin(dim=0) < 1e-6).all()

    def test_only_one_has_the_layer(self, make: Make, tmp_path: Path) -> None:
        """Pruning applies there too: an adapter without the layer changes it by zero."""
        folders = [make("a"), make("b", target_modules=["q_proj"])]
        combine([(folder, 1.0) for folder in folders], tmp_path / "out", "magnitude_prune", density=0.25)
        parts, found = layer_parts(folders[0]), layer_parts(tmp_path / "out")
        name = "model.layers.0.mlp.up_proj"
        torch.testing.assert_close(
            found[name][0], math.sqrt(2.0) * pruned(parts[name][0], 0.25), rtol=1e-5, atol=1e-6
        )

    @pytest.mark.parametrize("combination_type", COMBINATION_TYPES)
    def test_peft_s_own_result_where_peft_is_right(
        self, make: Make, tmp_path: Path, combination_type: str
    ) -> None:
        """On the whole model, plain LoRA of one rank: `add_weighted_adapter` as PEFT's users call it."""
        folders, density = [make("a"), make("b")], {"density": 1.0} if "_" in combination_type else {}
        if combination_type in ("ties", "magnitude_prune"):
            density = {"density": 0.5}
        combine([(folders[0], 0.7), (folders[1], 0.3)], tmp_path / "out", combination_type, **density)
        model = PeftModel.from_pretrained(llama(tied=False), str(folders[0]), adapter_name="a")
        model.load_adapter(str(folders[1]), "b")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.add_weighted_adapter(
                ["a", "b"], [0.7, 0.3], "c", combination_type=combination_type, **density
            )
        ours = deltas(tmp_path / "out")
        for name, module in model.get_base_model().named_modules():
            if name in ours:
                theirs = module.get_delta_weight("c").detach().double()
                torch.testing.assert_close(ours[name], theirs, rtol=1e-4, atol=1e-5)


class TestResult:
    def test_stock_peft_goes_on_from_it(self, make: Make, tmp_path: Path) -> None:
        """Logits of the base with the sum added to its weights are those of the base with the result."""
        folders, weights = [make("a"), make("b", **PATTERNS, use_rslora=True)], [0.5, 0.8]
        combine(list(zip(folders, weights, strict=True)), tmp_path / "out", "cat")
        dense, wanted = llama(tied=False), weighted_sum(folders, weights)
        for name, delta in wanted.items():
            dense.get_submodule(name).weight.data += delta.float()
        model = PeftModel.from_pretrained(llama(tied=False), str(tmp_path / "out"))
        ids = torch.arange(3, 20)[None]
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
        again = combine([(tmp_path / "out", 1.0), (folders[0], -0.5)], tmp_path / "again", "cat")
        assert again.deviation < 1e-6

    def test_targets_stay_where_all_have_the_same(self, make: Make, tmp_path: Path) -> None:
        options = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}
        combine([(make("a", **options), 1.0), (make("b", **options), 1.0)], tmp_path / "out", "linear")
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
        assert config["layers_to_transform"] == [1]
        assert len(deltas(tmp_path / "out")) == 2

    def test_progress(self, make: Make, tmp_path: Path) -> None:
        calls: list[tuple[int, int]] = []
        pairs = [(make("a"), 1.0), (make("b"), 1.0)]
        combine(pairs, tmp_path / "out", "linear", progress=lambda done, total: calls.append((done, total)))
        assert calls == [(done, 14) for done in range(1, 15)]


def rewrite(folder: Path, **changes: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"combination_type": "tie"}, "no combination type 'tie' (did you mean 'ties'?)"),
            ({"combination_type": "ties"}, "ties needs a density"),
            ({"combination_type": "ties", "density": 0.0}, "density 0: give more than 0"),
            ({"combination_type": "svd", "density": 0.5}, "svd prunes nothing"),
            ({"combination_type": "cat", "rank": 4}, "cat decides the rank itself"),
            ({"combination_type": "svd", "rank": 0}, "rank 0: give at least 1"),
            (
                {"combination_type": "ties", "density": 0.5, "majority_sign_method": "most"},
                "majority sign method 'most': give total or frequency",
            ),
            ({"combination_type": "svd", "majority_sign_method": "frequency"}, "svd elects no signs"),
        ],
    )
    def test_settings(self, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError) as error:
            combine([("a", 1.0), ("b", 1.0)], tmp_path / "out", **settings)
        assert message in str(error.value)

    def test_one_adapter(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="at least two"):
            combine([("a", 1.0)], tmp_path / "out", "linear")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"use_dora": True}, "use_dora"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
            ({"trainable_token_indices": {"embed_tokens": [5]}}, "trainable_token_indices"),
        ],
    )
    @pytest.mark.parametrize("turned", [False, True])
    def test_what_peft_would_lose(
        self, make: Make, tmp_path: Path, options: dict[str, Any], message: str, turned: bool
    ) -> None:
        pairs = [(make("a"), 1.0), (make("b", **options), 1.0)]
        with pytest.raises(ModelError, match=rf"b: cannot be combined \({message}\)"):
            combine(pairs[::-1] if turned else pairs, tmp_path / "out", "cat")
        assert not (tmp_path / "out").exists()

    def test_an_initialisation_that_changed_the_base(self, make: Make, tmp_path: Path) -> None:
        changed = rewrite(make("b"), init_lora_weights="pissa_niter_4")
        with pytest.raises(ModelError, match=r"its initialisation .* changed the base"):
            combine([(make("a"), 1.0), (changed, 1.0)], tmp_path / "out", "cat")

    def test_other_bases(self, make: Make, tmp_path: Path) -> None:
        first = rewrite(make("a"), base_model_name_or_path="some/model")
        other = rewrite(make("b"), base_model_name_or_path="another/model")
        with pytest.raises(ModelError, match=r"made for some/model and .* for another/model"):
            combine([(first, 1.0), (other, 1.0)], tmp_path / "out", "cat")
        combine([(first, 1.0), (other, 1.0)], tmp_path / "out", "cat", same_base=True)

    def test_one_base_under_two_names(
        self, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "base").mkdir()
        monkeypatch.chdir(tmp_path)
        first = rewrite(make("a"), base_model_name_or_path="base")
        other = rewrite(make("b"), base_model_name_or_path=str(tmp_path / "base"))
        combine([(first, 1.0), (other, 1.0)], tmp_path / "out", "cat")

    def test_other_shapes(self, make: Make, tmp_path: Path) -> None:
        model = get_peft_model(llama(hidden=128), LoraConfig(r=4, target_modules=["q_proj"]))
        model.save_pretrained(str(tmp_path / "wide"), save_embedding_layers=False)
        with pytest.raises(ModelError, match=r"is 64 x 64 in .* and 128 x 128 in .*different bases"):
            combine([(make("a"), 1.0), (tmp_path / "wide", 1.0)], tmp_path / "out", "cat", same_base=True)

    @pytest.mark.parametrize("combination_type", ["linear", "ties"])
    @pytest.mark.parametrize("second", [{"r": 8}, {"rank_pattern": {"q_proj": 2}}])
    def test_ranks(self, make: Make, tmp_path: Path, combination_type: str, second: dict[str, Any]) -> None:
        density = 0.5 if combination_type == "ties" else None
        pairs = [(make("a"), 1.0), (make("b", **second), 1.0)]
        with pytest.raises(ModelError, match=f"{combination_type} needs one rank; use cat or svd"):
            combine(pairs, tmp_path / "out", combination_type, density=density)

    def test_damage(self, make: Make, tmp_path: Path) -> None:
        pairs = [(make("a"), 1.0), (make("b"), 1.0)]
        rewrite(pairs[1][0], r=8)
        with pytest.raises(ModelError, match="does not fit its settings, rank 8"):
            combine(pairs, tmp_path / "out", "cat")
        weights = pairs[1][0] / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:500])
        with pytest.raises(ModelError, match="cannot be read"):
            combine(pairs, tmp_path / "out", "cat")
        weights.unlink()
        with pytest.raises(ModelError, match="the weights are missing"):
            combine(pairs, tmp_path / "out", "cat")
        with pytest.raises(ModelError, match="no adapter here"):
            combine([pairs[0], (tmp_path / "nowhere", 1.0)], tmp_path / "out", "cat")

    def test_an_output_in_use(self, make: Make, tmp_path: Path) -> None:
        pairs = [(make("a"), 1.0), (make("b"), 1.0)]
        with pytest.raises(ModelError, match="exists already"):
            combine(pairs, pairs[0][0], "cat")

    def test_every_error_is_one_line(self, make: Make, tmp_path: Path) -> None:
        bad = rewrite(make("b"), peft_type="IA3")
        with pytest.raises(FourBitError) as error:
            combine([(make("a"), 1.0), (bad, 1.0)], tmp_path / "out", "cat")
        assert str(error.value) == f"{bad}: a IA3 adapter; only LoRA is understood"


def test_types_are_peft_s() -> None:
    module = nn.Module()
    module.layer = nn.Linear(3, 3)
    model = get_peft_model(module, LoraConfig(r=2, target_modules=["layer"]), adapter_name="one")
    model.add_adapter("two", LoraConfig(r=2, target_modules=["layer"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in COMBINATION_TYPES:
            model.add_weighted_adapter(["one", "two"], [1.0, 1.0], name, combination_type=name, density=1.0)
        with pytest.raises(ValueError, match="Invalid combination_type"):
            model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "x", combination_type="other")
    assert set(BY_SVD) < set(COMBINATION_TYPES)

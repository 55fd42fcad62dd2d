"""Masks over a bank as a PEFT tuner: its counts, its banks, its profiles, and PEFT's own calls."""

import copy
import os

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from small_models import BUILDERS, batch, build, logits, train
from torch import nn

from snell.peft import MaskedLinear, Profile, SnellConfig, XpeftConfig, use_profiles

KINDS = pytest.mark.parametrize("masks", ["hard", "soft"])
UPDATES = pytest.mark.parametrize("update", ["lora", "snell"])
SMALL = {"num_adapters": 9, "k": 3, "r": 4, "scale": 1.0, "init_weights": False}


def adapted(name="bert", **settings) -> tuple[PeftModel, nn.Module]:
    base = build(name)
    untouched = copy.deepcopy(base)
    return get_peft_model(base, XpeftConfig(**{**SMALL, **settings})).eval(), untouched


def layers(model):
    return [module for module in model.modules() if isinstance(module, MaskedLinear)]


@pytest.mark.parametrize(("num", "size"), [(100, 312), (200, 600), (400, 1200), (800, 2400)])
def test_a_profile_of_bert_base_has_the_papers_size(num, size, tmp_path):
    with torch.device("meta"):
        model = get_peft_model(tf.BertModel(tf.BertConfig()), XpeftConfig(num_adapters=num))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 12 * num
    Profile(torch.zeros(12, 2, num), num // 2, bytes(8)).save(tmp_path / "profile")
    assert (tmp_path / "profile").stat().st_size == 32 + size


@UPDATES
@KINDS
@pytest.mark.parametrize("name", list(BUILDERS))
def test_masks_change_the_outputs_train_and_merge(name, masks, update):
    # SNELL's gate squares K: at a scale of 1 its update would hardly show.
    model, base = adapted(name, masks=masks, update=update, scale={"lora": 1.0, "snell": 20.0}[update])
    data = batch(name, 2)
    y = logits(model, data)
    # These tiny models' outputs move little: by some 1e-4 with unlucky numbers, where rounding moves them by 1e-8.
    assert (y - logits(base, data)).abs().max() > 1e-6
    with model.disable_adapter():
        assert logits(model, data).equal(logits(base, data))
    assert all(p.grad is not None and p.grad.any() for p in _gradients(model, data))
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged, data), y, rtol=1e-3, atol=1e-4)
    model.merge_adapter()
    model.unmerge_adapter()
    weights = [(layer.get_base_layer().weight, name) for name, layer in model.named_modules() if _masked(layer)]
    originals = dict(base.named_modules())
    assert all(w.equal(originals[name.removeprefix("base_model.model.")].weight) for w, name in weights)


def _masked(layer):
    return isinstance(layer, MaskedLinear)


def _gradients(model, data):
    model(**data).loss.backward()
    return [p for p in model.parameters() if p.requires_grad]


@UPDATES
@KINDS
def test_save_and_load_keep_every_bit(masks, update, tmp_path):
    model, base = adapted(masks=masks, update=update)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 2000  # masks alone, no bank
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    data = batch("bert", 2)
    assert logits(loaded, data).equal(logits(model, data))
    assert "import snell.peft" in (tmp_path / "README.md").read_text()


def trained_bank(tmp_path, count=3, config=None):
    """Folders of adapters that differ, and the models they come from."""
    models, folders = [], []
    for i in range(count):
        torch.manual_seed(i)
        model = get_peft_model(
            build("bert"), config or LoraConfig(r=4, lora_alpha=6, target_modules=["query", "value"])
        )
        for p in (p for name, p in model.named_parameters() if "lora_" in name):
            nn.init.normal_(p)
        model.save_pretrained(tmp_path / str(i))
        models.append(model.eval())
        folders.append(str(tmp_path / str(i)))
    return models, folders


LORA = LoraConfig(r=4, lora_alpha=6, target_modules=["query", "value"])
SNELL = SnellConfig(r=4, target_modules=["query", "value"], kernel="rbf", train_theta=False, groups=1)


@pytest.mark.parametrize("config", [None, SNELL], ids=["lora", "snell"])
def test_a_mask_of_one_trained_adapter_is_that_adapter(config, tmp_path):
    models, folders = trained_bank(tmp_path, config=config)
    data = batch("bert", 2)
    for i, model in enumerate(models):
        base = copy.deepcopy(model).unload()
        masked = get_peft_model(base, XpeftConfig(bank=folders, k=1)).eval()
        assert {name.rpartition(".")[2] for name, layer in masked.named_modules() if _masked(layer)} == {
            "query",
            "value",
        }
        for layer in layers(masked):
            for mask in layer.masks("default"):
                mask.data[0, i] = 1.0
        torch.testing.assert_close(logits(masked, data), logits(model, data), rtol=1e-5, atol=1e-5)


def test_banks_that_do_not_fit_are_refused(tmp_path):
    _, folders = trained_bank(tmp_path)
    get_peft_model(build("bert"), LoraConfig(r=8, target_modules=["query", "value"])).save_pretrained(tmp_path / "rank")
    get_peft_model(build("bert"), LoraConfig(r=4, target_modules=["query"])).save_pretrained(tmp_path / "modules")
    get_peft_model(build("bert"), SNELL).save_pretrained(tmp_path / "kind")
    dora = LoraConfig(r=4, target_modules=["query", "value"], use_dora=True)
    get_peft_model(build("bert"), dora).save_pretrained(tmp_path / "dora")
    for name, sentence in (
        ("rank", "one r;"),
        ("modules", "the same modules"),
        ("kind", "one peft_type"),
        ("dora", "use_dora"),
        ("nothing", "no adapter_config.json"),
    ):
        with pytest.raises(ValueError, match=sentence):
            get_peft_model(build("bert"), XpeftConfig(bank=[*folders, str(tmp_path / name)]))
    with pytest.raises(ValueError, match="set target_modules to theirs"):
        get_peft_model(build("bert"), XpeftConfig(bank=folders, target_modules=["key"]))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"k": 10}, "k must be an int from 1 to 9"),
        ({"k": 0}, "k must be"),
        ({"masks": "firm"}, "masks must be one of hard, soft"),
        ({"combine": "max"}, "combine must be one of mean, sum"),
        ({"update": "ia3"}, "update must be one of lora, snell"),
        ({"bank": "folder"}, "bank must be a list of folders"),
        ({"bank": []}, "bank must be a list of folders"),
        ({"bank_dtype": "int8"}, "bank_dtype must be one of"),
        ({"bank_seed": -1}, "bank_seed must lie in"),
        ({"num_adapters": 0}, "num_adapters must be"),
        ({"num_profiles": 0}, "num_profiles must be"),
        ({"update": "snell", "sparsity": 1.0}, "sparsity must lie in"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        XpeftConfig(**{**SMALL, **settings})


@UPDATES
@KINDS
def test_profiles_together_are_profiles_one_by_one(masks, update):
    """Outputs and gradients of a batch in which each sample has its own profile."""
    together, base = adapted(num_profiles=3, masks=masks, update=update)
    data, whose = batch("bert", 4), [2, 0, 2, 1]
    with use_profiles(together, whose):
        y = together(**data).logits
        y.square().sum().backward()
    alone = get_peft_model(base, XpeftConfig(**{**SMALL, "masks": masks, "update": update})).eval()
    grads = [torch.zeros_like(p) for layer in layers(together) for p in layer.masks("default")]
    for i, profile in enumerate(whose):
        if masks == "soft":  # a hard profile keeps what it chooses, which has no softmax of its own
            Profile.of(together, profile=profile).put_in(alone)
        else:
            for one, other in zip(layers(alone), layers(together), strict=True):
                for mask, of in zip(one.masks("default"), other.masks("default"), strict=True):
                    mask.data.copy_(of.data[profile : profile + 1])
        sample = {key: value[i : i + 1] for key, value in data.items()}
        alone.zero_grad()
        mine = alone(**sample).logits
        torch.testing.assert_close(mine[0], y[i], rtol=1e-4, atol=1e-5)
        mine.square().sum().backward()
        for grad, p in zip(grads, (p for layer in layers(alone) for p in layer.masks("default")), strict=True):
            grad[profile] += p.grad[0]
    for grad, p in zip(grads, (p for layer in layers(together) for p in layer.masks("default")), strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=2e-3, atol=1e-6)


def test_whose_a_sample_is_must_be_said_and_known():
    model, _ = adapted(num_profiles=3)
    data = batch("bert", 2)
    with pytest.raises(ValueError, match="has 3 profiles: say whose"):
        model(**data)
    with pytest.raises(ValueError, match=r"profiles must lie in \[0, 3\)"), use_profiles(model, [0, 3]):
        pass
    with pytest.raises(ValueError, match="an entry for each of the 2 samples"), use_profiles(model, [0]):
        model(**data)
    with pytest.raises(ValueError, match="must have an X-PEFT adapter"), use_profiles(build("bert"), [0]):
        pass


def test_adapters_of_their_own_mix_in_a_batch_as_pefts_do():
    model, base = adapted()
    model.add_adapter("other", XpeftConfig(**{**SMALL, "bank_seed": 3}))
    data = batch("bert", 3)
    del data["labels"]
    y = model(**data, adapter_names=["other", "__base__", "default"]).logits
    for i, name in enumerate(("other", None, "default")):
        sample = {key: value[i : i + 1] for key, value in data.items()}
        if name:
            model.set_adapter(name)
        torch.testing.assert_close((model if name else base)(**sample).logits[0], y[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num", [8, 9, 15, 16, 17])
def test_a_hard_profile_survives_its_file(num, tmp_path):
    model, _ = adapted(num_adapters=num, k=4)
    data, path = batch("bert", 2), tmp_path / "profile"
    before = logits(model, data)
    Profile.of(model).save(path)
    assert path.stat().st_size == 32 + 2 * len(layers(model)) * -(-num // 8)
    for layer in layers(model):
        for mask in layer.masks("default"):
            nn.init.normal_(mask)
    assert not logits(model, data).equal(before)
    Profile.load(path).put_in(model)
    assert logits(model, data).equal(before)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("float32", 0.0)])
def test_a_soft_profile_survives_its_file(dtype, tolerance, tmp_path):
    model, _ = adapted(masks="soft")
    profile = Profile.of(model)
    profile.save(tmp_path / "profile", dtype)
    loaded = Profile.load(tmp_path / "profile")
    torch.testing.assert_close(loaded.logits, profile.logits, rtol=tolerance, atol=0)
    with pytest.raises(ValueError, match="dtype must be float16 or float32"):
        profile.save(tmp_path / "profile", "int8")
    assert os.listdir(tmp_path) == ["profile"]


def test_broken_and_foreign_files_are_refused(tmp_path):
    model, _ = adapted()
    path = tmp_path / "profile"
    Profile.of(model).save(path)
    content = path.read_bytes()
    for broken, sentence in (
        (b"", "is not a profile"),
        (b"RIFF" + content[4:], "is not a profile"),
        (content[:4] + b"\x09" + content[5:], "is of version 9"),
        (content[:-1], "is broken"),
        (content[:-1] + bytes([content[-1] ^ 8]), "is broken"),
        (content[:12] + b"\x01" + content[13:], "is broken"),
    ):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=sentence):
            Profile.load(path)
    for other, sentence in (
        ({"bank_seed": 1}, "another bank"),
        ({"num_adapters": 10}, "its adapters is 10, not 9"),
        ({"k": 2}, "its k is 2, not 3"),
        ({"target_modules": ["query"], "layers_to_transform": [0]}, "its layers is 1, not 2"),
        ({"masks": "soft"}, "its k is None"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Profile.of(adapted(**other)[0]).put_in(model)
    with pytest.raises(ValueError, match="adapter_name must be an X-PEFT adapter"):
        Profile.of(build("bert"))
    with pytest.raises(ValueError, match=r"profile must lie in \[0, 1\)"):
        Profile.of(model, profile=1)


def test_a_bank_is_shared_by_copies_and_no_part_of_the_state():
    model, _ = adapted()
    twin = copy.deepcopy(model)
    pairs = zip(layers(model), layers(twin), strict=True)
    assert all(one.xpeft_bank["default"] is other.xpeft_bank["default"] for one, other in pairs)
    assert all(value.numel() <= 9 for name, value in model.state_dict().items() if "xpeft" in name)


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    model = get_peft_model(build("bert"), XpeftConfig(num_adapters=20, r=4, scale=1.0, target_modules="all-linear"))
    data = batch("bert", 8)
    before, *_, after = train(model, data, 60)
    assert after < 0.97 * before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_bases_and_banks(dtype):
    base = build("bert").to(dtype)
    config = XpeftConfig(**{**SMALL, "bank_dtype": "bfloat16", "update": "snell", "init_weights": True})
    model = get_peft_model(base, config).eval()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logits(model, batch("bert", 2)).dtype == dtype
    train(model, batch("bert", 2))
    assert all(mask.any() for layer in layers(model) for mask in layer.masks("default"))

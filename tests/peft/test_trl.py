"""TRL's trainers: they train fresh and trained adapters, and their reference policy is the model they start from."""

import math

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from small_models import llama
from tokenizers import Tokenizer, models, pre_tokenizers

from snell.peft import RedConfig, SnellConfig

trl = pytest.importorskip("trl", reason="pip install '.[trl]'")
datasets = pytest.importorskip("datasets")

WORDS = "<pad> <s> </s> <unk> red blue green big small cat dog bird sees likes"
PROMPTS = ["big dog ", "small cat ", "red bird ", "blue cat "]
GOOD = ["sees red bird", "likes big dog", "sees green cat", "likes blue bird"]
BAD = ["likes", "sees sees", "cat", "bird dog dog"]

KINDS = {
    "SNELL": SnellConfig(r=4, target_modules="all-linear", init_weights="identity"),
    "RED": RedConfig(),
    "LoRA": LoraConfig(r=4, target_modules="all-linear"),
}

PAIRS = {"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD}
JUDGED = {"prompt": PROMPTS * 2, "completion": GOOD + BAD, "label": [True] * 4 + [False] * 4}

# Each trainer's name, its data, and settings of its own.
TRAINERS = {
    "SFT": ({"prompt": PROMPTS, "completion": GOOD}, {}),
    "DPO": (PAIRS, {}),
    "KTO": (JUDGED, {}),
    "GRPO": ({"prompt": PROMPTS}, {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}),
}


@pytest.fixture(scope="module")
def tokenizer() -> tf.PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS.split())}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=words, **names)


def trainer(kind: str, model, tokenizer, folder, config=None, **settings):
    """A TRL trainer on its own kind of data."""
    data, own = TRAINERS[kind]
    arguments = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-2}
    others = {
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "bf16": False,
        "disable_tqdm": True,
        "seed": 1,
    }
    more = (
        {"reward_funcs": lambda completions, **_: [float(len(text)) for text in completions]} if kind == "GRPO" else {}
    )
    return getattr(trl, f"{kind}Trainer")(
        model=model,
        args=getattr(trl, f"{kind}Config")(output_dir=str(folder), **{**arguments, **others, **own, **settings}),
        train_dataset=datasets.Dataset.from_dict(data),
        processing_class=tokenizer,
        peft_config=config,
        **more,
    )


def trained(name: str) -> PeftModel:
    """A model with an adapter that changes its outputs."""
    torch.manual_seed(0)
    model = get_peft_model(llama(), KINDS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def losses(run) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("start", ["fresh", "trained"])
def test_a_trainer_trains_the_adapter_alone(kind, start, tokenizer, tmp_path):
    model, config = (llama(), KINDS["SNELL"]) if start == "fresh" else (trained("SNELL"), None)
    run = trainer(kind, model, tokenizer, tmp_path, config)
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    run.train()
    changed = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("snell_" in name and ".default.weight" in name for name in changed)
    assert all(math.isfinite(loss) for loss in losses(run))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("start", ["fresh", "trained"])
def test_the_first_loss_of_dpo_is_ln_2(name, start, tokenizer, tmp_path):
    model, config = (llama(), KINDS[name]) if start == "fresh" else (trained(name), None)
    run = trainer("DPO", model, tokenizer, tmp_path, config, learning_rate=0.0, beta=5.0)
    run.train()
    assert len(losses(run)) == 2
    assert all(abs(loss - math.log(2)) <= 1e-6 for loss in losses(run))


@pytest.mark.parametrize("kind", ["KTO", "GRPO"])
def test_the_reference_policy_is_the_trained_adapter_it_starts_from(kind, tokenizer, tmp_path):
    run = trainer(kind, trained("SNELL"), tokenizer, tmp_path)
    factors = {name: p for name, p in run.model.named_parameters() if ".default." in name}
    assert factors
    for name, factor in factors.items():
        assert torch.equal(run.model.get_parameter(name.replace(".default.", ".ref.")), factor), name


# Not GRPO: resumed, TRL's trainer draws other completions, with LoRA too.
@pytest.mark.parametrize("kind", ["SFT", "DPO", "KTO"])
def test_a_resumed_run_equals_the_one_that_was_not_interrupted(kind, tokenizer, tmp_path):
    def run(folder, **settings):
        torch.manual_seed(0)
        return trainer(kind, llama(), tokenizer, tmp_path / folder, KINDS["SNELL"], max_steps=4, **settings)

    whole = run("whole")
    whole.train()
    run("broken", save_strategy="steps", save_steps=2).train()
    resumed = run("broken")
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-2"))
    expected = dict(whole.model.named_parameters())
    assert losses(resumed) == losses(whole)
    assert [name for name, p in resumed.model.named_parameters() if not torch.equal(p, expected[name])] == []

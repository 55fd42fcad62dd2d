"""Trainings that are killed amid their saves resume without loss, to the bits of one that was not killed."""

import multiprocessing
import signal

import pytest

pytest.importorskip("tqdm")

from deaths import save_twice_and_die
from peft import PeftModel
from small_models import build

from seeds import SEED
from tests.stress.kill import kill_plain, kill_trainer, newest_folder

KILLS = 4


def test_a_killed_trainer_resumes_from_the_newest_whole_checkpoint_without_loss(tmp_path):
    outcome = kill_trainer(tmp_path, KILLS, SEED)
    assert outcome.problems == []
    # Every second kill strikes on a line of a save, and almost all lines come before the Trainer's state is written.
    assert outcome.kills == KILLS
    assert outcome.amid_a_save >= 1


def test_resuming_from_the_newest_folder_fails_on_a_torn_one(tmp_path):
    outcome = kill_trainer(tmp_path, 20, SEED, resume=newest_folder)
    assert outcome.problems == ["the run does not resume: it ended by itself, with exit code 1"]
    assert outcome.amid_a_save == 1


def test_the_adapter_saved_before_a_kill_stays_and_training_goes_on_from_it(tmp_path):
    outcome = kill_plain(tmp_path, KILLS, SEED)
    assert outcome.problems == []
    assert outcome.kills == KILLS
    assert outcome.amid_a_save >= 1


# The configuration is encoded with its file open and empty.
@pytest.mark.parametrize(("save", "loads"), [("save_adapter", True), ("save_pretrained", False)])
def test_a_kill_while_the_configuration_is_written_spoils_only_a_save_in_place(save, loads, tmp_path):
    folder = tmp_path / "adapter"
    process = multiprocessing.get_context("forkserver").Process(
        target=save_twice_and_die, args=(folder, save, "json/encoder.py")
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    if loads:
        PeftModel.from_pretrained(build("llama"), folder)
    else:
        with pytest.raises(ValueError):
            PeftModel.from_pretrained(build("llama"), folder)

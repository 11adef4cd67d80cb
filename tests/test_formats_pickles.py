"""Torch pickles: containers every program opens, and no code from a file ever runs."""

import os
import pickle
import re
import zipfile
from collections import OrderedDict

import pytest
import torch

from finetune.errors import Problem
from finetune.formats import pickles

THREE_GLOBALS = ["collections.OrderedDict", "torch.FloatStorage", "torch._utils._rebuild_tensor_v2"]
# What the A1111 web UI lets pass: zip members, and pickle globals (older releases know fewer storages).
WEBUI_MEMBER = re.compile(r"^([^/]+)/((data/\d+)|version|byteorder|\.data/serialization_id|data\.pkl)$")
WEBUI_GLOBALS = {*THREE_GLOBALS, "torch._utils._rebuild_parameter", "torch.HalfStorage", "torch.IntStorage", "torch.LongStorage",
                 "torch.DoubleStorage", "torch.ByteStorage", "torch.BFloat16Storage", "torch.nn.modules.container.ParameterDict"}


def webui_accepts(path):
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if not all(WEBUI_MEMBER.match(name) for name in archive.namelist()):
                return False
    return set(pickles.globals_in(path)) <= WEBUI_GLOBALS


def test_trap_2_the_web_ui_accepts_our_container_and_not_torchs(tmp_path):
    content = {768: (OrderedDict({"linear.0.weight": torch.ones(2, 2)}), OrderedDict()), "name": "x", "step": 3, "no": None, "on": True}
    pickles.save_legacy(content, tmp_path / "ours.pt")
    torch.save(content, tmp_path / "torchs.pt")
    assert webui_accepts(tmp_path / "ours.pt")
    assert not webui_accepts(tmp_path / "torchs.pt")
    assert pickles.globals_in(tmp_path / "ours.pt") == THREE_GLOBALS == pickles.globals_in(tmp_path / "torchs.pt")
    loaded = pickles.load_restricted(tmp_path / "ours.pt")
    assert torch.equal(loaded[768][0]["linear.0.weight"], torch.ones(2, 2)) and type(loaded[768]) is tuple
    assert {key: loaded[key] for key in ("name", "step", "no", "on")} == {"name": "x", "step": 3, "no": None, "on": True}


def test_a_view_is_saved_without_the_rest_of_its_storage(tmp_path):
    table = torch.randn(1000, 64)
    pickles.save_legacy({"row": table[5:6]}, tmp_path / "row.pt")
    assert (tmp_path / "row.pt").stat().st_size < 1200
    assert torch.equal(pickles.load_restricted(tmp_path / "row.pt")["row"], table[5:6])


def test_parameters_and_state_dict_attributes_become_plain(tmp_path):
    module = torch.nn.Linear(2, 2)
    pickles.save_legacy({"state": module.state_dict(), "weight": module.weight}, tmp_path / "x.pt")
    assert pickles.globals_in(tmp_path / "x.pt") == THREE_GLOBALS


@pytest.mark.parametrize("value", [torch.ones(1).numpy(), {1, 2}, torch.float16, torch.nn.Linear(1, 1)])
def test_what_needs_more_globals_is_refused_on_writing(tmp_path, value):
    with pytest.raises(Problem, match=r"the file\['deep'\]\[0\] is a .*cannot go into a .pt"):
        pickles.save_legacy({"deep": [value]}, tmp_path / "x.pt")
    assert list(tmp_path.iterdir()) == []


class Attack:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_listed_and_never_run(tmp_path, zipped):
    target = tmp_path / "attacked"
    torch.save({"x": Attack(target)}, tmp_path / "evil.pt", _use_new_zipfile_serialization=zipped)
    assert pickles.globals_in(tmp_path / "evil.pt") == [f"{os.mkdir.__module__}.mkdir"]
    with pytest.raises(Problem, match="its pickle asks for .*mkdir"):
        pickles.load_restricted(tmp_path / "evil.pt")
    assert not target.exists()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_globals_are_found_in_every_protocol_and_behind_the_memo(tmp_path, protocol):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps([OrderedDict(), Attack("a"), Attack("b"), os.rmdir], protocol=protocol))
    assert pickles.globals_in(path) == ["collections.OrderedDict", f"{os.mkdir.__module__}.mkdir", f"{os.mkdir.__module__}.rmdir"]


def test_a_computed_global_name_is_a_question_mark(tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:  # the module's name is no text in the stream
        archive.writestr("x/data.pkl", b"\x80\x04K\x01\x8c\x06system\x93.")
    assert pickles.globals_in(path) == ["?"]


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n" + b"\0" * 64, pickle.dumps({"plain": 1})])
def test_other_files_are_refused_kindly(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(Problem, match="not a torch file"):
        pickles.load_restricted(tmp_path / "x.pt")


@pytest.mark.parametrize("keep", [100, 400, 700])
def test_cut_off_files_are_refused_kindly(tmp_path, keep):
    pickles.save_legacy({"x": torch.randn(100)}, tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:keep])
    with pytest.raises(Problem):
        pickles.load_restricted(tmp_path / "x.pt")

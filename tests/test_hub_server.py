# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The stand-in for the Hub answers the real clients as the Hub does. Each client is a process of its own."""

import textwrap

import huggingface_hub
import pytest
from hub_server import HubServer, blob_id
from quick_python import run_python


README = b"---\nlicense: apache-2.0\ntags:\n- flux\npipeline_tag: image-to-image\n---\n# Title\n"


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def client(hub, tmp_path):
    """Runs code in a fresh process against the hub. Returns what it printed, or its error if it has to fail."""

    def run(code: str, token: str | None = hub.token, check: bool = True, home: str = "home") -> str:
        env = hub.environment(tmp_path / home, token)
        done = run_python("-c", textwrap.dedent(code), env=env, cwd=tmp_path)
        assert (done.returncode == 0) == check, done.stderr
        return done.stdout if check else done.stderr

    return run


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "folder"
    (path / "sub").mkdir(parents=True)
    (path / "README.md").write_bytes(README)
    (path / "sub" / "weights.safetensors").write_bytes(bytes(range(256)) * 64)
    (path / "empty").write_bytes(b"")
    return path


UPLOAD = """
    from huggingface_hub import HfApi
    api = HfApi()
    url = api.create_repo("user/new.repo", exist_ok=True)
    print(url, url.repo_id)
    print(api.upload_folder(repo_id="user/new.repo", folder_path="folder", commit_message="hello").oid)
"""


def test_upload_look_up_and_download(hub, client, folder):
    printed = client(UPLOAD).split()
    head = hub.repos["model", "user/new.repo"].branches["main"]
    assert printed == [f"{hub.url}/user/new.repo", "user/new.repo", head]
    files = hub.files("user/new.repo")
    assert files["README.md"] == README and files["empty"] == b""
    assert files["sub/weights.safetensors"] == (folder / "sub" / "weights.safetensors").read_bytes()

    client(
        f"""
        from pathlib import Path
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download
        api = HfApi()
        info = api.model_info("user/new.repo")
        assert info.sha == "{head}" and info.card_data["license"] == "apache-2.0", info
        names = [".gitattributes", "README.md", "empty", "sub/weights.safetensors"]
        assert sorted(api.list_repo_files("user/new.repo")) == [f.rfilename for f in info.siblings] == names
        assert [(e.path, hasattr(e, "size")) for e in api.list_repo_tree("user/new.repo")][-1] == ("sub", False)
        assert [b.target_commit for b in api.list_repo_refs("user/new.repo").branches] == ["{head}"]
        paths = api.get_paths_info("user/new.repo", ["sub", "empty", "none"])
        assert [p.path for p in paths] == ["sub", "empty"]
        assert api.file_exists("user/new.repo", "empty") and not api.file_exists("user/new.repo", "none")
        path = Path(snapshot_download("user/new.repo"))
        assert path.name == "{head}" and (path / "sub/weights.safetensors").stat().st_size == 16384
        hf_hub_download("user/new.repo", "README.md", local_files_only=True)
        """,
        token=None,
    )


def test_unchanged_files_make_no_commit_and_branches_are_apart(hub, client, folder):
    client(UPLOAD)
    client(UPLOAD + "    assert api.whoami()['name'] == 'user'")
    # The initial commit and one upload.
    assert len(hub.repos["model", "user/new.repo"].commits) == 2
    client(
        """
        from huggingface_hub import HfApi
        api = HfApi()
        api.create_branch("user/new.repo", branch="dev/a")
        api.upload_file(path_or_fileobj=b"new", path_in_repo="empty", repo_id="user/new.repo", revision="dev/a")
        api.delete_folder("sub", repo_id="user/new.repo", revision="dev/a")
        """
    )
    assert hub.files("user/new.repo")["empty"] == b"" and hub.files("user/new.repo", "dev/a")["empty"] == b"new"
    assert "sub/weights.safetensors" not in hub.files("user/new.repo", "dev/a")


def test_private_repos_and_tokens(hub, client, folder):
    hub.add_repo("user/secret", {"a.txt": b"a"}, private=True)
    download = (
        'from huggingface_hub import hf_hub_download; print(open(hf_hub_download("user/secret", "a.txt")).read())'
    )
    assert client(download).strip() == "a"
    assert "RepositoryNotFoundError" in client(download, token=None, check=False, home="other")
    assert "401" in client(download, token="hf_wrong", check=False, home="other")
    assert "401" in client(UPLOAD, token=None, check=False)
    assert "401" in client(UPLOAD, token="hf_wrong", check=False)
    assert "403" in client(UPLOAD.replace("user/", "someone/"), check=False)
    assert list(hub.repos) == [("model", "user/secret")]
    client('from huggingface_hub import create_repo; create_repo("user/closed", private=True)')
    assert hub.repos["model", "user/closed"].private


def test_not_found_and_conflict(hub, client):
    hub.add_repo("user/repo", {"a.txt": b"a"})
    client(
        """
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.errors import *
        def raises(kind, call):
            try:
                call()
            except kind as error:
                return error
            raise AssertionError(kind)
        api = HfApi()
        raises(RepositoryNotFoundError, lambda: api.model_info("user/none"))
        raises(RepositoryNotFoundError, lambda: api.dataset_info("user/repo"))
        raises(RevisionNotFoundError, lambda: api.model_info("user/repo", revision="none"))
        raises(RemoteEntryNotFoundError, lambda: hf_hub_download("user/repo", "none"))
        raises(RemoteEntryNotFoundError, lambda: list(api.list_repo_tree("user/repo", "none")))
        error = raises(HfHubHTTPError, lambda: api.create_repo("user/repo"))
        assert error.response.status_code == 409
        upload = dict(path_or_fileobj=b"b", path_in_repo="b", parent_commit="0" * 40)
        error = raises(HfHubHTTPError, lambda: api.upload_file(repo_id="user/repo", **upload))
        assert error.response.status_code == 412
        raises(RepositoryNotFoundError, lambda: api.upload_file(repo_id="user/none", **upload))
        """
    )
    assert hub.files("user/repo")["a.txt"] == b"a" and "b" not in hub.files("user/repo")


@pytest.mark.skipif(
    huggingface_hub.__version__.startswith("1."), reason="this version validates cards at the real Hub only"
)
def test_card_validation(hub, client):
    client(
        """
        from huggingface_hub import ModelCard
        ModelCard("---\\nlicense: mit\\n---\\ntext").validate()
        for wrong in ("tags: [1]", "license: [1, 2]", "pipeline_tag: {a: b}", "base_model: /a/folder"):
            try:
                ModelCard(f"---\\n{wrong}\\n---\\ntext", ignore_metadata_errors=True).validate()
            except ValueError as error:
                assert wrong.split(":")[0] in str(error), error
            else:
                raise AssertionError(wrong)
        """
    )


@pytest.mark.parametrize("action", [500, "cut"])
def test_failed_commit_is_retried(hub, client, folder, action):
    hub.fail("POST", "/commit/main$", action)
    client(UPLOAD)
    statuses = [request.status for request in hub.requests if "/commit/" in request.path]
    assert statuses == [action, 200]
    assert len(hub.repos["model", "user/new.repo"].commits) == 2


def test_cut_download_is_continued(hub, client):
    content = bytes(range(256)) * 4096
    hub.add_repo("user/repo", {"big.bin": content})
    hub.fail("GET", "/resolve/.*/big.bin", "cut")
    client(
        f"""
        import hashlib, pathlib
        from huggingface_hub import hf_hub_download
        content = pathlib.Path(hf_hub_download("user/repo", "big.bin")).read_bytes()
        assert hashlib.sha1(b"blob %d\\0" % len(content) + content).hexdigest() == "{blob_id(content)}"
        """
    )
    statuses = [request.status for request in hub.requests if request.method == "GET" and "big.bin" in request.path]
    assert statuses[0] == "cut" and statuses[-1] in (200, 206)


def test_fault_reaches_a_client_that_does_not_retry(hub, client):
    hub.fail("POST", "/api/repos/create", 500)
    assert "500" in client(UPLOAD, check=False)


def test_datasets_load_from_it(hub, client):
    rows = b'{"text": "a", "n": 1}\n{"text": "b", "n": 2}\n'
    hub.add_repo("user/data", {"train.jsonl": rows}, repo_type="dataset")
    client(
        """
        from datasets import load_dataset
        assert load_dataset("user/data", split="train")["n"][:] == [1, 2]
        """
    )


def test_diffusers_load_from_it(hub, client):
    pipeline = b"from diffusers import DDPMPipeline\n\n\nclass Mine(DDPMPipeline):\n    greeting = 'hello'\n"
    hub.add_repo("user/dotted.repo", {"pipeline.py": pipeline})
    client(
        """
        import torch
        from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
        unet = UNet2DModel(8, 1, 1, block_out_channels=(4, 4), down_block_types=("DownBlock2D",) * 2,
                           up_block_types=("UpBlock2D",) * 2, norm_num_groups=2, add_attention=False)
        DDPMPipeline(unet, DDPMScheduler()).push_to_hub("base")
        custom = {"custom_pipeline": "user/dotted.repo", "trust_remote_code": True}
        pipe = DiffusionPipeline.from_pretrained("user/base", **custom)
        assert type(pipe).__name__ == "Mine" and pipe.greeting == "hello"
        pairs = zip(unet.state_dict().values(), pipe.unet.state_dict().values())
        assert all(torch.equal(a, b) for a, b in pairs)
        """
    )
    assert "model_index.json" in hub.files("user/base")


def test_lora_loads_from_it(hub, client):
    client(
        """
        import torch
        from diffusers import FluxPipeline
        from huggingface_hub import HfApi
        lora = {"transformer.a.lora_A.weight": torch.ones(2, 4), "transformer.a.lora_B.weight": torch.ones(4, 2)}
        from safetensors.torch import save
        HfApi().create_repo("user/lora")
        name = "pytorch_lora_weights.safetensors"
        HfApi().upload_file(path_or_fileobj=save(lora), path_in_repo=name, repo_id="user/lora")
        loaded = FluxPipeline.lora_state_dict("user/lora")
        assert loaded.keys() == lora.keys() and all(torch.equal(loaded[key], lora[key]) for key in lora)
        """
    )


def test_requests_are_recorded(hub, client):
    hub.add_repo("user/repo")
    client('from huggingface_hub import model_info; model_info("user/repo")')
    (request,) = hub.requests
    assert (request.method, request.path, request.status) == ("GET", "/api/models/user/repo", 200)
    headers = {name.lower(): value for name, value in request.headers.items()}
    assert headers["authorization"] == f"Bearer {hub.token}"

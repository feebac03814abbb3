"""The command line, called as a function: what it prints and how it fails."""

import pytest
from serving_models import small_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from pyagent_kv_jax.models import save_model
from pyagent_kv_jax.serving.command_line import main


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    """The small model on disk, with a tokenizer of one token a character."""
    directory = tmp_path_factory.mktemp("model")
    save_model(small_model(), directory)
    tokenizer = Tokenizer(models.WordLevel({chr(32 + i): i for i in range(95)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(directory / "tokenizer.json"))
    return str(directory)


SMALL = ["--max-tokens", "6", "--max-num-seqs", "4", "--token-budget", "16", "--ignore-eos"]


def test_one_prompt_and_the_same_streamed(model_directory, capsys):
    arguments = ["generate", "--model", model_directory, "--prompt", "hello", *SMALL]
    assert main(arguments) == 0
    answer = capsys.readouterr().out
    assert len(answer) > 1
    assert main([*arguments, "--stream"]) == 0
    assert capsys.readouterr().out == answer


def test_a_file_of_prompts_sampled(model_directory, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo words\n")
    arguments = ["generate", "--model", model_directory, "--prompts", str(file), *SMALL, "--num-blocks", "8"]
    arguments += ["--block-size", "4", "--temperature", "0.9", "--top-k", "9", "--top-p", "0.9", "--seed", "3"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert [line for line in first.splitlines() if line.startswith(">>>")] == [">>> one", ">>> two words"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == first  # the seed makes it repeatable


def test_several_answers_to_each_prompt(model_directory, capsys):
    arguments = ["generate", "--model", model_directory, "--prompt", "hello you", *SMALL, "--temperature", "2"]
    assert main([*arguments, "--seed", "1"]) == 0
    first = capsys.readouterr().out
    assert main([*arguments, "--seed", "1", "-n", "3"]) == 0
    answers = capsys.readouterr().out.splitlines()
    assert answers[0] == f"[1] {first.rstrip()}"
    assert [line[:3] for line in answers] == ["[1]", "[2]", "[3]"]
    assert len({line[4:] for line in answers}) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "want text of at least one token"),
        (["--prompt", "a", "--prompt", "b", "--stream"], "--stream: got 2 prompts"),
        (["--prompt", "a", "-n", "2", "--stream"], "--stream: got 1 prompts, 2 answers each"),
        (["--prompt", "a", "--samples", "0"], "SamplingParams.n: got 0"),
        (["--prompt", "a", "--temperature", "-1"], "temperature: got -1.0"),
        (["--prompt", "a", "--max-tokens", "1000"], "want at most 128 (one row)"),
        (["--prompt", "a", "--num-blocks", "1", "--block-size", "4", "--max-tokens", "9"], "(the pool)"),
        (["--prompts", "/nowhere/prompts.txt"], "No such file"),
    ],
)
def test_our_errors_are_one_line_and_exit_code_2(model_directory, capsys, arguments, message):
    assert main(["generate", "--model", model_directory, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.startswith("pyagent-kv: error: ")
    assert captured.err.count("\n") == 1


def test_bad_models_and_prompt_files(tmp_path, capsys):
    assert main(["generate", "--model", str(tmp_path / "no"), "--prompt", "a"]) == 2
    assert "no directory" in capsys.readouterr().err
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\nthree\n")
    assert main(["generate", "--model", str(tmp_path), "--prompts", str(file)]) == 2
    assert "line 2 is empty" in capsys.readouterr().err


def test_usage_errors_exit_with_2(capsys):
    for arguments in ([], ["generate", "--prompt", "a"], ["nonsense"]):
        with pytest.raises(SystemExit) as exited:
            main(arguments)
        assert exited.value.code == 2

"""lm-evaluation-harness: a multiple-choice and a rolling task on local text, through local-completions."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

url, demo = sys.argv[1], sys.argv[3]
WORDS = ("file", "socket", "thread", "string")
with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    rows = [
        {"text": f"Return the {word} object.", "q": f"Close the {word}", "choices": ["if it is open.", "zzqx"], "a": 0}
        for word in WORDS
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'data.jsonl'}}}}}\ntest_split: test\n"
    (folder / "choice.yaml").write_text(
        f"task: local_choice\n{data}output_type: multiple_choice\ndoc_to_text: '{{{{q}}}}'\ndoc_to_choice: '{{{{choices}}}}'\n"
        "doc_to_target: '{{a}}'\nmetric_list: [{metric: acc}]\n"
    )
    (folder / "rolling.yaml").write_text(
        f"task: local_rolling\n{data}output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{{{text}}}}'\n"
        "metric_list: [{metric: word_perplexity}]\n"
    )
    command = [
        sys.executable, "-m", "lm_eval", "--model", "local-completions", "--tasks", "local_choice,local_rolling",
        "--include_path", name, "--output_path", f"{name}/out", "--batch_size", "4", "--model_args",
        f"base_url={url}/v1/completions,model=apt-jax-demo,tokenizer={demo},num_concurrent=2,max_length=1024",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=name)
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = Path(f"{name}/out").rglob("results*.json")
    found = json.loads(result.read_text())["results"]
    accuracy, perplexity = found["local_choice"]["acc,none"], found["local_rolling"]["word_perplexity,none"]
    assert accuracy == 1.0 and 1 < perplexity < 1e4, found
print(f"multiple_choice (accuracy {accuracy:g} of a task that any text model solves) and loglikelihood_rolling")

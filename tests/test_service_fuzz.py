"""Requests made from the service's own description, right and wrong: none may break it, no wrong one passes."""

import subprocess
import sys
from pathlib import Path

import pytest
from service_kit import served

pytestmark = pytest.mark.slow

# Left out: that whatever fits the description is accepted. Rules between fields (top_logprobs needs logprobs, a prompt
# and its answer fit the context) and between strings and the tokenizer cannot be said in it.
LEFT_OUT = "positive_data_acceptance"


def test_500_requests_for_every_operation_and_not_one_server_error(checkpoint_folder, tmp_path: Path):
    program = Path(sys.executable).with_name("schemathesis")
    with served(checkpoint_folder, max_new_tokens=16, api_key="k") as here:
        wishes = {
            "mode": "all", "max-examples": "500", "phases": "examples,coverage,fuzzing", "checks": "all",
            "exclude-checks": LEFT_OUT, "generation-allow-x00": "true", "warnings": "off", "seed": "1",
            "header": "Authorization: Bearer k",
        }  # fmt: skip
        command = [program, "run", f"http://127.0.0.1:{here.port}/openapi.json"]
        command += [f"--{name}={value}" for name, value in wishes.items()]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
        outcomes = here.outcomes()
        assert set(outcomes) == {"ok", "client_error"}
        assert sum(outcomes.values()) > 1500 and outcomes["ok"] > 300
        assert {line["status"] for line in here.lines()} <= {200, 400, 401, 404, 405, 415}

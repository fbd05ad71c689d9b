"""`push_to_hub` and model cards: see push_scenarios.py."""

import push_scenarios
import pytest
import scenarios


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, str | None]:
    return scenarios.outcomes(push_scenarios, tmp_path_factory.mktemp("scenarios"))


@pytest.mark.parametrize("name", scenarios.names(push_scenarios))
def test_scenario(name, outcomes):
    assert outcomes[name] is None, outcomes[name]

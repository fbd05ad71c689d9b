"""The converter and a Hub that fails: see convert_hub_scenarios.py."""

import convert_hub_scenarios
import pytest
import scenarios


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, str | None]:
    return scenarios.outcomes(convert_hub_scenarios, tmp_path_factory.mktemp("scenarios"))


@pytest.mark.parametrize("name", scenarios.names(convert_hub_scenarios))
def test_scenario(name, outcomes):
    assert outcomes[name] is None, outcomes[name]

"""cloister_client.consent: the hospital's own policy comes before any plan."""

import pytest

from cloister_client.consent import ANY, Policy, consent
from cloister_shared.errors import ConsentRefused
from cloister_shared.plan import Mechanism


def test_no_privacy_is_refused_unless_the_policy_names_it(plan_with):
    plan = plan_with(privacy={"mechanism": "none"})
    with pytest.raises(ConsentRefused) as refused:
        consent(Policy(), plan, "st-marys")
    for said in (
        "st-marys takes part under privacy.mechanism site, shared only",
        "the plan says none",
        "policy: {mechanisms: [site, shared, none]}",
    ):
        assert said in str(refused.value)
    consent(Policy(mechanisms=(Mechanism.NONE,)), plan, "st-marys")
    consent(ANY, plan, "st-marys")


def test_a_policy_names_every_mechanism_that_it_accepts(plan_with):
    plan = plan_with(dp=True)
    consent(Policy(), plan, "st-marys")
    with pytest.raises(ConsentRefused, match="only, and the plan says site"):
        consent(Policy(mechanisms=(Mechanism.SHARED,)), plan, "st-marys")

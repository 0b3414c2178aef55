"""The environments: what their tools do, what they refuse, and that a call from data can raise nothing else."""
import copy
import json
from typing import Any, Optional

import pytest

import tools
from tools import CITIES, CUSTOMERS, ENVIRONMENTS, ITEMS, Calculator, Environment, Shop, ToolError, make_environment, tool

NAMES = ["calculator", "shop"]


@pytest.fixture
def calculator():
    return Calculator(7)


@pytest.fixture
def shop():
    return Shop(7)


def an_order(shop, status="pending"):
    """Some stored order with this status: (order_id, a copy of it)."""
    return next((order_id, dict(order)) for order_id, order in shop.state["orders"].items() if order["status"] == status)


def refusal(environment, name, *arguments, **keywords) -> str:
    """The message with which a call is refused; the call must leave the state as it was."""
    before = copy.deepcopy(environment.state)
    with pytest.raises(ToolError) as caught:
        environment.call(name, list(arguments), keywords)
    assert environment.state == before
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------
# environments in general

@pytest.mark.parametrize("name", NAMES)
def test_the_seed_determines_the_state(name):
    first, second, other = make_environment(name, 3), make_environment(name, 3), make_environment(name, 4)
    assert first.state == second.state and first.starting_point() == second.starting_point()
    assert first.state != other.state
    other.reset(3)
    assert other.state == first.state and other.starting_point() == first.starting_point()


@pytest.mark.parametrize("name", NAMES)
def test_many_seeds_give_many_worlds(name):
    assert len({json.dumps(make_environment(name, seed).state) for seed in range(50)}) == 50


def test_environments_share_no_state():
    first, second = Shop(5), Shop(5)
    untouched = copy.deepcopy(second.state)
    order_id, order = an_order(first)
    first.call("change_quantity", [order_id, 5 if order["quantity"] != 5 else 6], {})
    first.call("cancel_order", [order_id], {})
    first.state["stock"]["tea"] = 99
    assert second.state == untouched == Shop(5).state
    one, two = Calculator(5), Calculator(5)
    one.state["tea"] = 99
    one.call("items", [], {}).clear()
    assert two.state["tea"] != 99 and two.call("items", [], {}) == ITEMS and one.call("items", [], {}) == ITEMS


def test_reset_undoes_every_change(shop):
    before = copy.deepcopy(shop.state)
    shop.call("cancel_order", [an_order(shop)[0]], {})
    assert shop.state != before
    shop.reset(7)
    assert shop.state == before


def test_make_environment_names_the_choices():
    assert type(make_environment("calculator")) is Calculator and type(make_environment("shop", 2)) is Shop
    with pytest.raises(ValueError) as caught:
        make_environment("casino")
    assert all(word in str(caught.value) for word in ["casino", *ENVIRONMENTS])


@pytest.mark.parametrize("name", NAMES)
def test_the_registry_and_the_descriptions_agree(name):
    kind = ENVIRONMENTS[name]
    assert kind.name == name and kind.summary and isinstance(kind.judged_by_answer, bool)


@pytest.mark.parametrize("name", NAMES)
def test_documentation_shows_every_tool_and_no_self(name):
    world = make_environment(name)
    text = world.documentation()
    assert "self" not in text
    for tool_name, function in world.tools.items():
        assert f"{tool_name}(" in text and function.__doc__ in text
    headings = [line.split("(")[0] for line in text.splitlines() if not line.startswith(" ")]
    assert headings == list(world.tools)


def test_the_tools_are_the_expected_ones():
    assert list(Calculator().tools) == ["items", "amount", "add", "subtract", "multiply", "larger"]
    assert list(Shop().tools) == ["find_customer", "list_orders", "find_order", "get_order", "stock", "cancel_order",
                                  "return_order", "change_quantity", "change_city"]


@pytest.mark.parametrize("seed", range(10))
def test_the_starting_point_names_something_of_this_world(seed):
    assert Calculator(seed).starting_point().split()[-1].rstrip(".") in ITEMS
    shop = Shop(seed)
    assert shop.starting_point().split()[-1].rstrip(".") in shop.state["customers"].values()


def test_an_unfinished_environment_says_what_is_missing():
    class Empty(Environment):
        pass

    with pytest.raises(NotImplementedError, match="Empty"):
        Empty()
    Empty.reset = lambda self, seed: None
    with pytest.raises(NotImplementedError, match="Empty"):
        Empty().starting_point()


def test_a_new_environment_needs_only_reset_and_tools():
    class Counter(Environment):
        def reset(self, seed):
            self.state = {"count": seed}

        @tool
        def increase(self, by: int = 1) -> int:
            """Add to the count."""
            self.state["count"] += by
            return self.state["count"]

        def not_a_tool(self):
            raise AssertionError("called")

    counter = Counter(5)
    assert counter.documentation() == "increase(by: int = 1) -> int\n    Add to the count."
    assert counter.call("increase", [], {}) == 6 and counter.call("increase", [], {"by": 4}) == 10
    assert "not_a_tool" in refusal(counter, "not_a_tool")


def test_annotations_say_what_a_tool_accepts_as_far_as_they_are_types():
    class Scale(Environment):
        def reset(self, seed):
            self.state = {}

        @tool
        def weigh(self, names: list[str] = (), kilos: float = 0.5, note: str | None = None, anything: Any = None, exact: bool = True,
                  limit: Optional[int] = None) -> int:
            """Weigh."""
            return 1

        @tool
        def heaviest(self, *kilos: float, **named: float) -> float:
            """The heaviest."""
            return max(*kilos, *named.values())

    scale = Scale()
    for accepted in [dict(names=["a"]), dict(kilos=3), dict(kilos=3.5), dict(note=None), dict(note="a"), dict(anything={}), dict(exact=False)]:
        assert scale.call("weigh", [], accepted) == 1
    for refused in [dict(names="a"), dict(kilos="3"), dict(kilos=True), dict(note=3), dict(exact=1), dict(limit="x")]:
        assert f"{next(iter(refused))} must be" in refusal(scale, "weigh", **refused)
    assert scale.call("heaviest", [1.5, 2], {"last": 3}) == 3
    assert "kilos must be float, not str" in refusal(scale, "heaviest", 1.5, "2")
    assert "named must be float, not list" in refusal(scale, "heaviest", 1.5, last=[2])


# ---------------------------------------------------------------------------------------------------
# calls as data

@pytest.mark.parametrize("name", ["nosuch", "", "reset", "call", "state", "tools", "_order", "__init__", "__class__", None, 3])
@pytest.mark.parametrize("kind", NAMES)
def test_only_tools_can_be_called(kind, name):
    message = refusal(make_environment(kind), name)
    assert "no tool" in message and repr(name) in message


@pytest.mark.parametrize("arguments, keywords, mentions", [
    ([], {}, "'a'"),
    ([1], {}, "'b'"),
    ([1, 2, 3], {}, "too many"),
    ([1], {"c": 2}, "'b'"),
    ([1, 2], {"c": 3}, "'c'"),
    ([1, 2], {"a": 3}, "'a'"),
    ([1, 2], {"self": 3}, "'self'"),
])
def test_arguments_must_fit_the_signature(calculator, arguments, keywords, mentions):
    with pytest.raises(ToolError) as caught:
        calculator.call("add", arguments, keywords)
    assert str(caught.value).startswith("add: ") and mentions in str(caught.value)


def test_keywords_are_accepted(calculator, shop):
    assert calculator.call("subtract", [], {"b": 2, "a": 9}) == 7
    assert calculator.call("subtract", [9], {"b": 2}) == 7
    order_id, order = an_order(shop)
    city = next(city for city in CITIES if city != order["city"])
    assert shop.call("change_city", [], {"city": city, "order_id": order_id}) == city


@pytest.mark.parametrize("value, called", [(True, "bool"), (False, "bool"), (2.0, "float"), ("2", "str"), (None, "NoneType"),
                                           ([2], "list"), ({"a": 2}, "dict")])
@pytest.mark.parametrize("name", ["add", "subtract", "multiply", "larger"])
def test_arithmetic_takes_whole_numbers_only(calculator, name, value, called):
    assert refusal(calculator, name, value, 2) == f"{name}: a must be int, not {called}"
    assert refusal(calculator, name, 2, value) == f"{name}: b must be int, not {called}"


@pytest.mark.parametrize("value, called", [(True, "bool"), (5, "int"), (None, "NoneType"), (["tea"], "list"), ({}, "dict")])
@pytest.mark.parametrize("name", ["find_customer", "list_orders", "get_order", "stock", "cancel_order", "return_order"])
def test_names_and_ids_are_text(shop, name, value, called):
    message = refusal(shop, name, value)
    assert message.startswith(f"{name}: ") and message.endswith(f"must be str, not {called}")


def test_every_argument_is_checked(shop):
    order_id, _ = an_order(shop)
    assert "quantity must be int, not bool" in refusal(shop, "change_quantity", order_id, True)
    assert "quantity must be int, not str" in refusal(shop, "change_quantity", order_id, quantity="5")
    assert "city must be str, not list" in refusal(shop, "change_city", order_id, CITIES)
    assert "item must be str, not int" in refusal(shop, "find_order", "C1", 3)


def nested(depth):
    """A dict in a dict in a dict."""
    value = {}
    for _ in range(depth):
        value = {"deeper": value}
    return value


SILLY = [10**30, -(10**30), 10**3000, 0, -1, True, None, 1.5, float("nan"), float("inf"), "", "x" * 10_000, "tea", "'\n\0\\", "\ud800",
         [], [[]], ["tea"] * 100, {}, {"a": 1}, nested(500), {"order_id": {"city": None}}]


@pytest.mark.parametrize("kind", NAMES)
def test_silly_arguments_raise_nothing_but_tool_errors(kind):
    environment = make_environment(kind, 1)
    before = copy.deepcopy(environment.state)
    for name in [*environment.tools, "nosuch"]:
        calls = [([], {})]
        calls += [(values, {}) for silly in SILLY for values in ([silly], [silly, silly], [silly, "tea"], [3, silly], [silly] * 3)]
        calls += [([], {key: silly}) for silly in SILLY for key in ("a", "item", "order_id", "self", "name", "", "\ud800", "arguments")]
        for arguments, keywords in calls:
            try:
                environment.call(name, arguments, keywords)
            except ToolError as error:
                assert str(error)
    assert environment.state == before


@pytest.mark.parametrize("arguments, keywords", [(None, {}), (3, {}), ([1], None), ([1], 3), ([1], {2: 3}), ([1], [2])])
def test_arguments_in_the_wrong_shape_are_refused(calculator, arguments, keywords):
    with pytest.raises(ToolError):
        calculator.call("add", arguments, keywords)


@pytest.mark.parametrize("name", [[], {}, ["add"]])
def test_a_name_that_is_not_text_is_refused(calculator, name):
    with pytest.raises(ToolError):
        calculator.call(name, [1, 2], {})


@pytest.mark.parametrize("name, a, b", [("add", 2**62, 2**62), ("add", -(2**63), -1), ("subtract", -(2**63), 1)])
def test_every_result_fits_through_the_pipe(calculator, name, a, b):
    try:
        result = calculator.call(name, [a, b], {})
    except ToolError:
        return
    assert -(2**63) <= result < 2**63


# ---------------------------------------------------------------------------------------------------
# the calculator

@pytest.mark.parametrize("seed", range(20))
def test_the_ledger_holds_every_item(seed):
    calculator = Calculator(seed)
    assert calculator.call("items", [], {}) == ITEMS == list(calculator.state)
    for item in ITEMS:
        assert calculator.call("amount", [item], {}) == calculator.state[item]
        assert 2 <= calculator.state[item] <= 20


def test_an_unknown_item_is_refused_with_a_hint(calculator):
    message = refusal(calculator, "amount", "gold")
    assert "'gold'" in message and "items()" in message
    assert "'Tea'" in refusal(calculator, "amount", "Tea")


@pytest.mark.parametrize("name, a, b, expected", [
    ("add", 5, -8, -3), ("add", 10**5, 1, 10**5 + 1),
    ("subtract", 5, 8, -3), ("subtract", 8, 5, 3),
    ("multiply", -4, 6, -24), ("multiply", 0, 10**6, 0), ("multiply", 1000, 1000, 10**6), ("multiply", -1000, 1000, -(10**6)),
    ("larger", 2, 9, 9), ("larger", 9, 2, 9), ("larger", -3, -7, -3), ("larger", 4, 4, 4),
])
def test_arithmetic(calculator, name, a, b, expected):
    assert calculator.call(name, [a, b], {}) == expected


@pytest.mark.parametrize("a, b", [(1001, 1000), (-1001, 1000), (10**6 + 1, 1), (10**3000, 10**3000)])
def test_multiply_ends_at_a_million(calculator, a, b):
    assert "million" in refusal(calculator, "multiply", a, b)


# ---------------------------------------------------------------------------------------------------
# the shop

@pytest.mark.parametrize("seed", range(20))
def test_every_shop_is_sound(seed):
    state = Shop(seed).state
    assert len(state["customers"]) == 6 == len(set(state["customers"].values())) and set(state["customers"].values()) <= set(CUSTOMERS)
    assert len(state["orders"]) == 24
    for order_id, order in state["orders"].items():
        assert list(order) == ["order_id", "customer_id", "item", "quantity", "city", "status"]
        assert order["order_id"] == order_id and order["customer_id"] in state["customers"]
        assert order["item"] in ITEMS and order["city"] in CITIES and 1 <= order["quantity"] <= 4
    for customer_id in state["customers"]:
        orders = [order for order in state["orders"].values() if order["customer_id"] == customer_id]
        assert len({order["item"] for order in orders}) == 4
        assert sorted(order["status"] for order in orders) == ["delivered", "delivered", "pending", "pending"]
    assert list(state["stock"]) == ITEMS and all(6 <= number <= 9 for number in state["stock"].values())


def test_look_ups_lead_from_a_name_to_an_order(shop):
    seen = []
    for customer_id, name in shop.state["customers"].items():
        assert shop.call("find_customer", [name], {}) == customer_id
        for order in shop.call("list_orders", [customer_id], {}):
            assert shop.call("find_order", [customer_id, order["item"]], {}) == order["order_id"]
            assert shop.call("find_order", [name, order["item"]], {}) == order["order_id"]
            assert shop.call("get_order", [order["order_id"]], {}) == order == shop.state["orders"][order["order_id"]]
            seen.append(order["order_id"])
    assert sorted(seen) == sorted(shop.state["orders"])
    for item in ITEMS:
        assert shop.call("stock", [item], {}) == shop.state["stock"][item]


def test_look_ups_refuse_what_is_not_there(shop):
    customer_id = next(iter(shop.state["customers"]))
    ordered = [order["item"] for order in shop.call("list_orders", [customer_id], {})]
    missing = next(item for item in ITEMS if item not in ordered)
    absent = next(name for name in CUSTOMERS if name not in shop.state["customers"].values())
    assert repr(absent) in refusal(shop, "find_customer", absent)
    assert "'C0'" in refusal(shop, "list_orders", "C0")
    assert "'C0'" in refusal(shop, "find_order", "C0", ordered[0])
    message = refusal(shop, "find_order", customer_id, missing)
    assert customer_id in message and repr(missing) in message and "list_orders" in message
    for name, more in [("get_order", []), ("cancel_order", []), ("return_order", []), ("change_quantity", [5]), ("change_city", ["Rome"])]:
        message = refusal(shop, name, "W0", *more)
        assert "'W0'" in message and "find_order" in message
    assert "'gold'" in refusal(shop, "stock", "gold")


def test_look_ups_give_copies(shop):
    before = copy.deepcopy(shop.state)
    order_id, order = an_order(shop)
    shop.call("get_order", [order_id], {})["status"] = "cancelled"
    orders = shop.call("list_orders", [order["customer_id"]], {})
    for listed in orders:
        listed.update(status="returned", city="Atlantis", quantity=99)
    orders.clear()
    assert shop.state == before and shop.call("get_order", [order_id], {}) == order


@pytest.mark.parametrize("name, arguments, accepted, change", [
    ("cancel_order", [], "pending", {"status": "cancelled"}),
    ("return_order", [], "delivered", {"status": "returned"}),
    ("change_quantity", [5], "pending", {"quantity": 5}),
    ("change_city", ["Rome"], "pending", {"city": "Rome"}),
])
def test_a_change_needs_the_right_status_and_changes_one_thing(name, arguments, accepted, change):
    shop = Shop(11)
    reached = {"cancelled": "cancel_order", "returned": "return_order"}
    for status, before in [("cancelled", "pending"), ("returned", "delivered")]:
        shop.call(reached[status], [an_order(shop, before)[0]], {})
    for status in {"pending", "delivered", "cancelled", "returned"} - {accepted}:
        message = refusal(shop, name, an_order(shop, status)[0], *arguments)
        assert status in message and accepted in message
    order_id, _ = an_order(shop, accepted)
    expected = copy.deepcopy(shop.state)
    expected["orders"][order_id].update(change)
    assert shop.call(name, [order_id, *arguments], {}) == next(iter(change.values()))
    assert shop.state == expected


def test_a_quantity_lies_between_one_and_the_stock(shop):
    order_id, order = an_order(shop)
    stock = shop.call("stock", [order["item"]], {})
    for quantity in (0, -1, stock + 1, 10**30):
        message = refusal(shop, "change_quantity", order_id, quantity)
        assert "1" in message and str(stock) in message
    for quantity in (1, stock):
        assert shop.call("change_quantity", [order_id, quantity], {}) == quantity
        assert shop.call("get_order", [order_id], {})["quantity"] == quantity
    assert shop.call("stock", [order["item"]], {}) == stock


def test_a_city_must_be_served(shop):
    order_id, _ = an_order(shop)
    message = refusal(shop, "change_city", order_id, "Atlantis")
    assert "'Atlantis'" in message and all(city in message for city in CITIES)
    assert "'rome'" in refusal(shop, "change_city", order_id, "rome")
    for city in CITIES:
        assert shop.call("change_city", [order_id, city], {}) == city
        assert shop.call("get_order", [order_id], {})["city"] == city


def test_tools_py_needs_no_torch():
    assert not hasattr(tools, "torch") and "import torch" not in open(tools.__file__).read()

"""Environments: small worlds whose hidden state can be seen and changed through tools alone.

An environment is a state (plain data) and a set of tools (typed methods with docstrings). A language
model never touches the state. It writes Python that calls the tools; that code runs in a jail
(verify.py), each call crosses a pipe as data, is executed here, and its result goes back as data.

The paper (section 4) uses Calculation and Web Browsing from M3ToolEval, and Retail and Airline from
TauBench. This file starts with two toy worlds in their spirit that need no download: `calculator`
is checked by the final answer, like Calculation, and `shop` by the state that is left, like Retail.

Read next: verify.py, which runs code against an environment and judges tasks.
"""
import functools
import inspect
import random
from types import UnionType
from typing import Any, Callable


class ToolError(Exception):
    """A tool's refusal. Its message is what the model sees, so it says what would be accepted."""


def tool(method: Callable) -> Callable:
    """Mark a method of an environment as a tool, that is, as callable by the model's code."""
    method.is_tool = True
    return method


class Environment:
    """A world: subclass it, fill `self.state` with plain data in `reset`, and mark methods with `@tool`.

    name        the word by which tasks and the command line call it
    answered    True if `evaluate(answer)` judges the final answer, False if `evaluate()` judges the state
    summary     one or two sentences for the model, shown above the tools' documentation
    """

    name: str
    answered: bool
    summary: str

    def __init__(self, seed: int = 0):
        self.state: Any = None
        self.reset(seed)

    def reset(self, seed: int) -> None:
        """Put the world into the state that `seed` determines; the same seed gives the same state."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to reset")

    def starting_point(self) -> str:
        """One sentence that gives the challenger something concrete to begin with in this state."""
        raise NotImplementedError(f"{type(self).__name__} names no starting point")

    @classmethod
    @functools.cache
    def tools(cls) -> dict[str, Callable]:
        """Return {name: function} of the tools, in the order in which the class defines them."""
        return {name: member for name, member in vars(cls).items() if getattr(member, "is_tool", False)}

    @classmethod
    def documentation(cls) -> str:
        """Return the tools' signatures and docstrings as the text that a model reads."""
        entries = []
        for name, function in cls.tools().items():
            signature = signature_of(function)
            signature = signature.replace(parameters=list(signature.parameters.values())[1:])  # without self
            entries.append(f"{name}{signature}\n    {inspect.getdoc(function)}")
        return "\n".join(entries)

    def call(self, name: str, arguments: list, keywords: dict) -> Any:
        """Execute one tool call that arrived as data; return the tool's result, which is data too.

        Raises ToolError, never anything else, if there is no such tool, if the arguments do not fit
        its signature, or if the tool refuses: all three are the model's mistakes, not the program's.
        """
        function = self.tools().get(name) if isinstance(name, str) else None
        if function is None:
            raise ToolError(f"there is no tool {name!r:.100}")
        signature = signature_of(function)
        try:
            bound = signature.bind(self, *arguments, **keywords)
        except TypeError as error:
            raise ToolError(f"{name}: {error}") from None
        for parameter, value in list(bound.arguments.items())[1:]:
            check_type(f"{name}: {parameter}", value, signature.parameters[parameter].annotation)
        return function(*bound.args, **bound.kwargs)


signature_of = functools.cache(inspect.signature)  # which takes longer than most tools


def check_type(what: str, value: Any, expected: type | UnionType) -> None:
    """Raise ToolError unless `value` is an instance of `expected`; True is not a number here."""
    fits = isinstance(value, expected) and not (isinstance(value, bool) and expected is not bool)
    if not fits:
        raise ToolError(f"{what} must be {getattr(expected, '__name__', expected)}, not {type(value).__name__}")


# ---------------------------------------------------------------------------------------------------
# calculator: judged by the answer

ITEMS = ["tea", "lamp", "chair", "book", "pen", "cup", "bag", "clock", "soap", "rope", "drum", "kite", "boat", "ring",
         "vase", "coat"]


class Calculator(Environment):
    """A ledger of named amounts that must be looked up, and the arithmetic to combine them.

    state: {item: amount}, every item of ITEMS with a whole number from 2 to 20.
    """

    name = "calculator"
    answered = True
    summary = "A ledger holds a hidden amount for each of some items. Look amounts up and combine them step by step."

    def reset(self, seed: int) -> None:
        generator = random.Random(f"calculator {seed}")
        self.state = {item: generator.randint(2, 20) for item in ITEMS}
        self.start = generator.choice(ITEMS)

    def starting_point(self) -> str:
        return f"Start from the item {self.start}."

    @tool
    def items(self) -> list:
        """The names of all items in the ledger."""
        return list(self.state)

    @tool
    def amount(self, item: str) -> int:
        """The amount that the ledger holds for an item."""
        if item not in self.state:
            raise ToolError(f"the ledger has no item {item!r}; items() lists them")
        return self.state[item]

    @tool
    def add(self, a: int, b: int) -> int:
        """a plus b."""
        return self._shown(a + b)

    @tool
    def subtract(self, a: int, b: int) -> int:
        """a minus b."""
        return self._shown(a - b)

    @tool
    def multiply(self, a: int, b: int) -> int:
        """a times b."""
        return self._shown(a * b)

    @tool
    def larger(self, a: int, b: int) -> int:
        """The larger of a and b."""
        return self._shown(max(a, b))

    def _shown(self, number: int) -> int:
        """The number, refused if the calculator's display has no room for it."""
        if abs(number) > 10**6:
            raise ToolError("the result does not fit on the calculator, which ends at a million")
        return number


# ---------------------------------------------------------------------------------------------------
# shop: judged by the state

CUSTOMERS = ["Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jonas", "Karen", "Liam", "Maria",
             "Noah", "Olga", "Paul", "Rosa", "Simon", "Tina", "Viktor"]
CITIES = ["Oslo", "Rome", "Paris", "Lima", "Cairo", "Delhi", "Tokyo", "Quito"]


class Shop(Environment):
    """Customers and their orders: an order is reached only through look-ups, and rules can refuse a change.

    state: {"customers": {customer_id: name}, "orders": {order_id: order}, "stock": {item: number}}, where an
    order is {"order_id", "customer_id", "item", "quantity", "city", "status"}, its status one of pending,
    delivered, cancelled, returned. A customer has at most one order of an item.
    """

    name = "shop"
    answered = False
    summary = "A shop keeps customers and their orders. Look up a customer's order first; ids cannot be guessed."

    def reset(self, seed: int) -> None:
        generator = random.Random(f"shop {seed}")
        names = generator.sample(CUSTOMERS, 6)
        customers = {f"C{number}": name for number, name in zip(generator.sample(range(100, 1000), 6), names)}
        orders = {}
        for customer_id in customers:
            for position, item in enumerate(generator.sample(ITEMS, 4)):
                order_id = f"W{generator.randint(100, 999)}{len(orders)}"  # the last digits keep the ids apart
                orders[order_id] = {
                    "order_id": order_id,
                    "customer_id": customer_id,
                    "item": item,
                    "quantity": generator.randint(1, 4),
                    "city": generator.choice(CITIES),
                    "status": ["pending", "pending", "delivered", "delivered"][position],
                }
        self.state = {"customers": customers, "orders": orders, "stock": {item: generator.randint(6, 9) for item in ITEMS}}
        self.start = names[0]

    def starting_point(self) -> str:
        return f"Start from the customer {self.start}."

    @tool
    def find_customer(self, name: str) -> str:
        """The id of the customer with this name."""
        for customer_id, customer in self.state["customers"].items():
            if customer == name:
                return customer_id
        raise ToolError(f"no customer has the name or id {name!r}")

    @tool
    def list_orders(self, customer: str) -> list:
        """All orders of a customer, who is given by name or by id, each as get_order gives it."""
        customer_id = customer if customer in self.state["customers"] else self.find_customer(customer)
        return [dict(order) for order in self.state["orders"].values() if order["customer_id"] == customer_id]

    @tool
    def find_order(self, customer: str, item: str) -> str:
        """The id of a customer's order of an item; the customer is given by name or by id."""
        for order in self.list_orders(customer):
            if order["item"] == item:
                return order["order_id"]
        raise ToolError(f"{customer} has no order of {item!r}; list_orders lists the orders")

    @tool
    def get_order(self, order_id: str) -> dict:
        """An order: order_id, customer_id, item, quantity, city and status."""
        return dict(self._order(order_id))

    @tool
    def stock(self, item: str) -> int:
        """How many pieces of an item are in stock."""
        if item not in self.state["stock"]:
            raise ToolError(f"the shop does not sell {item!r}")
        return self.state["stock"][item]

    @tool
    def cancel_order(self, order_id: str) -> str:
        """Cancel an order; only a pending one can be cancelled. Returns the new status."""
        order = self._order(order_id, status="pending")
        order["status"] = "cancelled"
        return order["status"]

    @tool
    def return_order(self, order_id: str) -> str:
        """Send an order back; only a delivered one can be returned. Returns the new status."""
        order = self._order(order_id, status="delivered")
        order["status"] = "returned"
        return order["status"]

    @tool
    def change_quantity(self, order_id: str, quantity: int) -> int:
        """Change the quantity of a pending order, within what is in stock. Returns the new quantity."""
        order = self._order(order_id, status="pending")
        if not 1 <= quantity <= self.state["stock"][order["item"]]:
            raise ToolError(f"the quantity must lie between 1 and the stock of {self.state['stock'][order['item']]}")
        order["quantity"] = quantity
        return quantity

    @tool
    def change_city(self, order_id: str, city: str) -> str:
        """Change the city to which a pending order is sent. Returns the new city."""
        order = self._order(order_id, status="pending")
        if city not in CITIES:
            raise ToolError(f"the shop does not deliver to {city!r}, only to {', '.join(CITIES)}")
        order["city"] = city
        return city

    def _order(self, order_id: str, status: str | None = None) -> dict:
        """The stored order, refused if there is none or if it does not have the status that a change needs."""
        order = self.state["orders"].get(order_id)
        if order is None:
            raise ToolError(f"no order has the id {order_id!r}; find_order finds it")
        if status is not None and order["status"] != status:
            raise ToolError(f"the order is {order['status']}, and only a {status} order can be changed so")
        return order


ENVIRONMENTS: dict[str, type[Environment]] = {kind.name: kind for kind in (Calculator, Shop)}


def make_environment(name: str, seed: int = 0) -> Environment:
    """Return a fresh environment in the state of `seed`; raises ValueError with the known names otherwise."""
    if name not in ENVIRONMENTS:
        raise ValueError(f"unknown environment {name!r}: choose from {', '.join(ENVIRONMENTS)}")
    return ENVIRONMENTS[name](seed)

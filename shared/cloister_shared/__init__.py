"""What coordinator and hospital agree on: the plan, the wire, the budget, the tasks, the errors."""

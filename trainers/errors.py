"""The one error of the border: which input, what was got, what was expected, what to do."""


class InputError(ValueError):
    """Report a problem with what the user gave.

    `input_name` is the node's input (or the setting); the node layer puts the node's name in front.
    """

    def __init__(self, input_name: str, problem: str):
        super().__init__(f"'{input_name}' {problem}")
        self.input_name = input_name

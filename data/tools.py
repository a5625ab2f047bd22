"""The functions that a row may call, as chat templates take them."""

from qwenlora.data.bad_row import BadRow, show
from qwenlora.data.chunks import JsonObject
from qwenlora.data.turns import from_json, without_null_keys


def read_tools(tools: object) -> list[JsonObject] | None:
    """Return the functions that a row may call; None without any. Raises: BadRow."""
    if not tools or (isinstance(tools, str) and not tools.strip()):
        return None
    tools = from_json(tools, "tools")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(f"tools must be a list of objects, found {show(tools)}")
    return [_tool(without_null_keys(tool)) for tool in tools] or None


def _tool(tool: JsonObject) -> JsonObject:
    """Return a tool as clients and servers of OpenAI's API send it: {"type": ..., "function": {...}}."""
    function = tool.get("function")
    if isinstance(function, dict):
        return tool if "type" in tool else {"type": "function", **tool}
    if tool.get("type", "function") != "function":
        return tool
    function = {key: value for key, value in tool.items() if key != "type"}
    if "input_schema" in function and "parameters" not in function:  # Anthropic's name
        function = {"parameters" if key == "input_schema" else key: value for key, value in function.items()}
    if not isinstance(function.get("name"), str):
        raise BadRow(f'a tool must be {{"name": ..., "parameters": {{...}}}}, found {show(tool)}')
    return {"type": "function", "function": function}

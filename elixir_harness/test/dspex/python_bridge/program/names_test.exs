defmodule DSPex.ProgramNamesTest do
  @moduledoc "The names that the peer refuses are refused at compile time."

  use ExUnit.Case, async: true

  alias DSPex.PythonBridge.Program.{Names, Refusal, Settings}
  alias DSPex.Test.Helpers

  doctest Names

  @rules """
  import json, keyword, warnings
  warnings.simplefilter("ignore")
  import dspy
  from dspy_bridge.lm import lm_options
  from dspy_bridge.programs import module_factory
  from dspy_bridge.signatures import builder

  names = {*dir(dspy.Signature), *dir(type(dspy.Signature))}
  own = {name: sorted(module_factory._OWN_FIELDS.get(name, ())) for name in module_factory.TYPES}
  sides = {side: {kind: sorted(names) for (kind, of), names in module_factory._OWN_ARGUMENTS.items() if of == side}
           for side in ("inputs", "outputs")}
  print(json.dumps({
      "keywords": sorted(keyword.kwlist),
      "attributes": sorted(n for n in names if hasattr(dspy.Signature, n) and not n.startswith("_")),
      "not_as_input": sorted(builder._NOT_AS_INPUT - {"signature"}),
      "settings": {"lm": sorted(lm_options._NAMES), "config": sorted(lm_options._CONFIG_NAMES),
                   "options": {kind: sorted(options) for kind, options in module_factory.OPTIONS.items()}},
      "own": own, "own_inputs": sides["inputs"], "own_outputs": sides["outputs"],
  }))
  """

  @tag timeout: 120_000
  test "what the peer refuses is refused when the module is compiled" do
    {json, 0} = System.cmd(Helpers.python(), ["-c", @rules])
    rules = JSON.decode!(List.last(String.split(json, "\n", trim: true)))
    names = Settings.names()
    sorted = fn names -> Enum.sort(names -- ["M", "N"]) end
    options = Map.new(names["options"], fn {type, names} -> {type, sorted.(names)} end)

    assert rules["settings"] ==
             %{names | "lm" => sorted.(names["lm"]), "config" => sorted.(names["config"])}
             |> Map.put("options", options)

    for name <- rules["keywords"] ++ rules["attributes"], do: assert(refused?(name, :outputs))
    for name <- rules["not_as_input"], do: assert(refused?(name, :inputs))

    for {types, sides} <- [
          {rules["own"], [:inputs, :outputs]},
          {rules["own_inputs"], [:inputs]},
          {rules["own_outputs"], [:outputs]}
        ],
        {type, names} <- types,
        type in Names.types(),
        name <- names,
        side <- sides,
        # The field that the type adds is then the declared one.
        {name, side} != {"reasoning", :outputs},
        do: assert(refused?(name, side, type), "#{type} #{side} #{name}")
  end

  test "other names are not refused" do
    for {name, side, type} <- [
          {"größe", :outputs, "predict"},
          {"config", :outputs, "predict"},
          {"completions", :inputs, "multi_chain_comparison"},
          {"reasoning", :outputs, "chain_of_thought"},
          {"module", :outputs, "react"},
          {"tool_calls", :outputs, "predict"}
        ],
        do: refute(refused?(name, side, type), name)

    for name <- ["_a", "dspy_a", "urgent?"], do: assert(refused?(name, :outputs))
    assert refused?("reasoning_attempt_1", :outputs, "multi_chain_comparison")
  end

  defp refused?(name, side, type \\ "predict") do
    kind = %{type: type, module: "predict", tools?: false}
    check = fn -> Names.check(String.to_atom(name), side, kind, "x") end
    match?({:error, _text}, Refusal.catching(check))
  end
end

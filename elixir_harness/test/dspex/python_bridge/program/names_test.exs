defmodule DSPex.ProgramNamesTest do
  @moduledoc "The names that are refused at compile time are those that the peer refuses."

  use ExUnit.Case, async: true

  alias DSPex.PythonBridge.{Bridge, Error}
  alias DSPex.PythonBridge.Program.{Names, Refusal}
  alias DSPex.Test.Helpers

  doctest Names

  @rules """
  import json, keyword, warnings
  warnings.simplefilter("ignore")
  import dspy
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
      "own": own, "own_inputs": sides["inputs"], "own_outputs": sides["outputs"],
  }))
  """

  @tag timeout: 120_000
  test "the rules are those of the peer, with its DSPy" do
    {json, 0} = System.cmd(Helpers.python(), ["-c", @rules])
    theirs = JSON.decode!(List.last(String.split(json, "\n", trim: true)))
    ours = Names.rules() |> JSON.encode!() |> JSON.decode!()
    # Not those that DSPy is about to drop.
    theirs = Map.new(theirs, fn {key, rules} -> {key, kept(rules)} end)
    sorted = fn rules -> Map.new(rules, fn {key, names} -> {key, sort(names)} end) end
    # An attribute of a later DSPy is refused by the peer alone.
    assert theirs["attributes"] -- ours["attributes"] == []
    assert sorted.(Map.delete(ours, "attributes")) == sorted.(Map.delete(theirs, "attributes"))
  end

  defp kept(rules) when is_map(rules), do: Map.drop(rules, ["program_of_thought", "code_act"])
  defp kept(names), do: names

  defp sort(names) when is_list(names), do: Enum.sort(names)
  defp sort(named), do: Map.new(named, fn {key, names} -> {key, Enum.sort(names)} end)

  @tag timeout: 120_000
  test "what is refused here the peer refuses too, and the other way round" do
    bridge = start_supervised!({Bridge, Helpers.real_opts()})
    tool = %{name: "now", args: %{}}

    for {side, name, type, tools} <- [
          {:outputs, :a, "predict", []},
          {:outputs, :größe, "predict", []},
          {:outputs, :urgent?, "predict", []},
          {:outputs, :_a, "predict", []},
          {:outputs, :dspy_a, "predict", []},
          {:outputs, :from, "predict", []},
          {:outputs, :json, "predict", []},
          {:outputs, :config, "predict", []},
          {:inputs, :config, "predict", []},
          {:inputs, :completions, "multi_chain_comparison", []},
          {:outputs, :reasoning_attempt_1, "multi_chain_comparison", []},
          {:outputs, :reasoning, "chain_of_thought", []},
          {:inputs, :reasoning, "chain_of_thought", []},
          {:outputs, :reasoning, "react", [tool]},
          {:outputs, :trajectory, "react", [tool]},
          {:outputs, :trajectory, "predict", []},
          {:inputs, :module, "react", [tool]},
          {:outputs, :module, "react", [tool]},
          {:outputs, :tool_calls, "predict", [tool]},
          {:outputs, :tool_calls, "predict", []},
          {:inputs, :tools, "chain_of_thought", [tool]}
        ] do
      kind = %{type: type, module: "predict", tools?: tools != []}
      fields = %{inputs: [%{name: "q"}], outputs: [%{name: "answer"}]}

      args = %{
        id: "names",
        program_type: type,
        tools: tools,
        signature: Map.update!(fields, side, &[%{name: name} | &1])
      }

      here = Refusal.catching(fn -> Names.check(name, side, kind, "x") end)
      there = Bridge.request(bridge, :create_program, args, timeout: 60_000)

      assert match?({:ok, _}, here) == match?({:ok, _, _}, there),
             "#{inspect({side, name, type})}: #{inspect({here, there})}"

      with {:error, error} <- there, do: assert(%Error{type: :invalid_args} = error)
    end
  end
end

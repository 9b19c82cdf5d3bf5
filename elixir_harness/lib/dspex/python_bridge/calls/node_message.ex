defmodule DSPex.PythonBridge.Calls.NodeMessage do
  @moduledoc false
  # The messages between a caller and a bridge of another node, which may run another version of this code during a
  # rolling upgrade. Their form never changes, whatever the structs are called here:
  #
  #   * `{:request, ref, pid, timeout, body, {retry, deaths, change}, %{stream?: boolean, tools?: boolean}}` to the bridge;
  #     older callers leave out the last element if both are false. `retry` is `:here`, `:never` or `:caller`
  #   * `{ref, reply}` and `{ref, :chunk, frame}` to the caller, and `{ref, :tool_call, tool_call}`, with a struct that was
  #     called `DSPex.PythonBridge.ToolCall`
  #   * `{:tool_result, port, id, frame}`, `:unreadable_frame` and `{:abandon, ref}` to the bridge
  #   * `{:bind, port, id, ref}` to the bridge, and `{ref, :ok | :over}` from it; older bridges do not answer it
  #
  # On one node the structs themselves are sent. The functions that other nodes call by name keep their names, too:
  # `DSPex.PythonBridge.Caller.find/1`, `DSPex.PythonBridge.Top.snapshot/1`.

  alias DSPex.PythonBridge.Calls.Request
  alias DSPex.PythonBridge.Tools.Invocation

  @tool_call :"Elixir.DSPex.PythonBridge.ToolCall"

  @doc "The message that takes a request to a bridge."
  @spec request(Request.t(), pid() | {atom(), node()}) :: tuple()
  def request(%Request{} = request, dest) when is_pid(dest) and node(dest) == node(),
    do: {:request, request}

  def request(%Request{ref: ref, pid: pid, timeout: timeout, body: body} = request, _far) do
    terms = {retry_there(request.retry), request.deaths, request.change}
    takes = %{stream?: request.stream?, tools?: request.tools?}
    {:request, ref, pid, timeout, body, terms, takes}
  end

  @doc "The request of such a message, of either form; it may be any term, since anything may be sent to a process."
  @spec read_request(tuple()) :: term()
  def read_request({:request, request}), do: request

  def read_request({:request, ref, pid, timeout, body, terms}),
    do: read_request({:request, ref, pid, timeout, body, terms, %{stream?: false, tools?: false}})

  def read_request({:request, ref, pid, timeout, body, {retry, deaths, change}, takes})
      when is_map_key(takes, :stream?) and is_map_key(takes, :tools?) do
    %Request{
      ref: ref,
      pid: pid,
      timeout: timeout,
      body: body,
      retry: retry_here(retry),
      deaths: deaths,
      change: change,
      stream?: takes.stream?,
      tools?: takes.tools?
    }
  end

  def read_request(_other), do: nil

  defp retry_there(:bridge), do: :here
  defp retry_there(:pool), do: :caller
  defp retry_there(:never), do: :never

  defp retry_here(:here), do: :bridge
  defp retry_here(:caller), do: :pool
  defp retry_here(other), do: other

  @doc "The message that takes a tool call to the caller with this alias."
  @spec tool_call(Invocation.t(), reference()) :: tuple()
  def tool_call(%Invocation{} = tool_call, ref) when node(ref) == node(),
    do: {ref, :tool_call, tool_call}

  def tool_call(%Invocation{} = tool_call, ref),
    do: {ref, :tool_call, %{tool_call | __struct__: @tool_call}}

  @doc "The tool call of such a message."
  @spec read_tool_call(map()) :: Invocation.t()
  def read_tool_call(%Invocation{} = tool_call), do: tool_call

  def read_tool_call(%{__struct__: @tool_call} = tool_call),
    do: struct!(Invocation, Map.delete(tool_call, :__struct__))
end

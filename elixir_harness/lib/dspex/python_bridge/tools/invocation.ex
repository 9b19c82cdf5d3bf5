defmodule DSPex.PythonBridge.Tools.Invocation do
  @moduledoc false
  # One call of a tool by a peer, from its frame to the frame of the result, in a process of its own.
  #
  # Whatever the function does, there is one answer: its result, or an error message.

  alias DSPex.PythonBridge.Protocol
  alias DSPex.PythonBridge.OTP.{Ask, ServerGuard}
  alias DSPex.PythonBridge.Tools.{Answer, FunctionHolder, Functions, Outcome, Span}

  # A bridge answers questions at once; one of an older version, on another node, does not answer this one.
  @bind_ms 5_000
  # Of a call_key, in hexadecimal digits: as many bits as a UUID.
  @key_digits 32

  @enforce_keys [:port, :id, :frame, :max_frame_bytes]
  defstruct [:port, :id, :frame, :max_frame_bytes]

  @typedoc "The port of a peer, or the process of a `DSPex.PythonBridge.Stub`, which has none."
  @type peer :: port() | pid()
  @typedoc """
  `port`: of the peer that calls, the only one that gets the result. `id`: of the call that it runs; with nil the
  result is sent even if that is over.
  """
  @type t :: %__MODULE__{
          port: peer(),
          id: pos_integer() | nil,
          frame: binary(),
          max_frame_bytes: pos_integer()
        }
  @typedoc "The message to the bridge: the frame of a result, or that the call could not be read."
  @type answer :: {:tool_result, peer(), pos_integer() | nil, binary()} | :unreadable_frame
  @type bridge :: pid() | {atom(), node()}

  @doc """
  Calls the function, in the calling process, and sends the answer to the proxy that started it.
  """
  @spec run(t(), FunctionHolder.source(), bridge(), callers :: [pid()]) :: :ok
  def run(%__MODULE__{} = call, {_holder, proxy, _peer} = source, bridge, callers) do
    Process.put(:"$callers", callers)
    answer = ServerGuard.run(fn -> answer(call, &serve(call, source, bridge, &1)) end)
    send(proxy, {:answered, self(), answer})
    :ok
  end

  @doc "Answers a call whose process has ended without an answer."
  @spec fail(t(), bridge(), reason :: term()) :: :ok
  def fail(%__MODULE__{} = call, bridge, reason) do
    answer_aside(call, bridge, fn {call_id, _name, _args} ->
      Answer.error(call_id, Outcome.ended(reason))
    end)
  end

  @doc """
  Answers, for the bridge, a tool call that no process makes: the run was called without `:tools`, or is over.
  """
  @spec refuse(t(), :not_given | :over) :: :ok
  def refuse(%__MODULE__{} = call, why) do
    answer_aside(%{call | id: nil}, self(), fn {call_id, name, _args} ->
      if why == :over,
        do: over(call_id, name),
        else: Answer.error(call_id, Answer.about(name, ":tools was not given for this call"))
    end)
  end

  # In a process of its own: frames may be large.
  defp answer_aside(call, bridge, make) do
    spawn(fn -> ServerGuard.run(fn -> send(bridge, answer(call, make)) end) end)
    :ok
  end

  @spec answer(t(), ({Protocol.id(), String.t(), map()} -> Answer.t())) :: answer()
  defp answer(%__MODULE__{} = call, make) do
    case Protocol.decode_tool_call(call.frame) do
      {:ok, call_id, name, args} -> result(call, make.({call_id, name, args}))
      {:error, call_id, text} -> result(call, Answer.error(call_id, text))
      {:error, _reason} -> :unreadable_frame
    end
  end

  defp result(call, %Answer{frame: frame}), do: {:tool_result, call.port, call.id, frame}

  ## By the holder of the functions

  defp serve(call, source, bridge, {call_id, name, args} = asked) do
    case FunctionHolder.fetch(source, name, digest(name, args)) do
      {:run, function, made, run} ->
        make(call, source, bridge, asked, {function, made, run})

      {:claimed, made} ->
        begin(call, source, bridge, asked, made)

      {:answered, answer, {_id, about}} ->
        told(Span.begin(about, bridge, name, true), Answer.to(answer, call_id))

      {:unknown, names, {_id, about}} ->
        text = "it was not given in :tools, which has #{Enum.join(names, ", ")}"
        answer = Answer.error(call_id, Answer.about(name, text))
        told(Span.begin(about, bridge, nil, false), answer)

      :over ->
        over(call_id, name)
    end
  end

  # The bridge first: once it knows, the death of the peer ends the run. If the peer is gone by then, the function must
  # not be called for it.
  defp begin(call, source, bridge, {call_id, name, _args} = asked, made) do
    with {:ok, :ok} <- Ask.ask(bridge, @bind_ms, &{:bind, call.port, call.id, &1}),
         {:run, function, made, run} <- FunctionHolder.begin(source, name, made) do
      make(call, source, bridge, asked, {function, made, run})
    else
      {:timeout, _ref} ->
        text = "not called: its bridge has not confirmed that the run is not sent again"
        Answer.error(call_id, Answer.about(name, text))

      _over ->
        over(call_id, name)
    end
  end

  defp make(call, {holder, _, _}, bridge, {call_id, name, args}, {function, made, {id, about}}) do
    span = Span.begin(about, bridge, name, false)
    {result, how} = Outcome.of(fn -> apply_to(function, args, made, id) end)
    answer = Answer.new(call_id, name, result, call.max_frame_bytes)
    # Before the peer has it, which may die then.
    FunctionHolder.answered(holder, made, answer)
    told(span, answer, how)
  end

  defp told(span, answer, how \\ :returned) do
    Span.over(span, answer, how)
    answer
  end

  defp apply_to(function, args, _made, _run_id) when is_function(function, 1), do: function.(args)

  defp apply_to(function, args, {digest, nth}, run_id) do
    hash = :crypto.hash(:sha256, [run_id, digest, Integer.to_string(nth)])
    key = hash |> Base.encode16(case: :lower) |> binary_part(0, @key_digits)
    function.(args, key)
  end

  @spec digest(String.t(), map()) :: Functions.digest()
  defp digest(name, args),
    do: :crypto.hash(:sha256, :erlang.term_to_iovec({name, args}, [:deterministic]))

  defp over(call_id, name),
    do: Answer.error(call_id, Answer.about(name, "the call that it belongs to is over"))
end

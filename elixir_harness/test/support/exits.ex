defmodule DSPex.Test.Exits do
  @moduledoc """
  User code that ends the process which calls it. Not in a test's file: protocols are
  consolidated before those are read.
  """

  defmodule OnInspect do
    @moduledoc "A value without JSON form that cannot be shown."
    defstruct [:a]

    defimpl Inspect do
      def inspect(_value, _opts), do: exit(:inspect)
    end
  end

  defmodule OnEncode do
    @moduledoc "A value whose JSON form cannot be made."
    defstruct [:a]

    defimpl JSON.Encoder do
      def encode(_value, _encoder), do: exit(:encode)
    end
  end

  defmodule OnMessage do
    @moduledoc "An exception that cannot say what it is."
    defexception [:a]

    @impl Exception
    def message(_exception), do: exit(:message)
  end

  defmodule OnWhereis do
    @moduledoc "A registry that does not work."
    def whereis_name(_name), do: exit(:whereis)
  end
end

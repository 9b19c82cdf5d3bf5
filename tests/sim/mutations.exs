defmodule Sim.Mutations do
end

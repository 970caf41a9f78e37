// Suggestions in an empty chat, which the model can answer.

const EMBEDDED = {
  "tiny-qwen3": ["What is 123 + 456?", "What is the capital of France?", "Sort these numbers: 9, 1, 19, 5"],
  "tiny-qwen3-vl": ["What is 4 + 5?", "Who are you?"],
};
EMBEDDED["tiny-mixtral"] = EMBEDDED["tiny-qwen3"];
const GENERAL = [
  "Explain how a KV cache makes decoding fast.",
  "Write a haiku about a compiler.",
  "Give me a Python function that merges sorted lists.",
];

// [{text, image}] for a model as server.js describes it. image: the text asks about a picture.
export function ideas({ root, sees }) {
  const texts = (EMBEDDED[root] ?? GENERAL).map((text) => ({ text, image: false }));
  if (!sees) return texts;
  return [{ text: root in EMBEDDED ? "What do you see?" : "Describe this picture.", image: true }, ...texts.slice(0, 2)];
}

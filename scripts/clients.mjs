// Does what clients.py does, with OpenAI's client for JavaScript, and prints a row of its table.
//
//     npm install openai
//     node scripts/clients.mjs [URL]
//
// In a page of another origin, which the server must allow (--allowed-origins): load a bundle of
// this file (npx esbuild scripts/clients.mjs --bundle --format=esm) after setting globalThis.url.
import OpenAI from "openai";

const MODEL = "tiny-qwen3";
const url = globalThis.url ?? globalThis.process?.argv[2] ?? "http://127.0.0.1:8000";
const client = new OpenAI({
  baseURL: `${url}/v1`, apiKey: "any", maxRetries: 0, dangerouslyAllowBrowser: true,
});
const user = { role: "user", content: "What is 3 + 4?" };
const again = { role: "user", content: "What is 5 + 6?" };
const schema = {
  type: "object", properties: { city: { type: "string", enum: ["Oslo", "Rome"] } },
  required: ["city"], additionalProperties: false,
};
const tool = { type: "function", function: { name: "weather", parameters: schema } };

const check = (isSo, words) => {
  if (!isSo) throw new Error(words);
};
const checkCity = (json) => check(schema.properties.city.enum.includes(JSON.parse(json).city), json);
const ask = (messages, options = {}) =>
  client.chat.completions.create({ model: MODEL, max_tokens: 200, messages, ...options });
const answer = async (...given) => (await ask(...given)).choices[0].message;

const cases = {
  async plain() {
    check((await answer([user])).content, "there is no text");
    check((await client.models.list()).data.some((one) => one.id === MODEL), "no model");
  },
  async stream() {
    let text = "";
    for await (const chunk of await ask([user], { stream: true })) {
      text += chunk.choices[0]?.delta.content ?? "";
    }
    check(text, "there is no text");
    const events = await client.responses.create({ model: MODEL, input: user.content, stream: true });
    for await (const event of events) text = event.response?.output_text ?? event.type;
    check(text, "a response has no end");
  },
  async turns() {
    check((await answer([user, await answer([user]), again])).content, "there is no text");
  },
  async tools() {
    const message = await answer([user], { tools: [tool], tool_choice: "required",
                                           parallel_tool_calls: false });
    const call = message.tool_calls[0];
    checkCity(call.function.arguments);
    const result = { role: "tool", tool_call_id: call.id, content: "7 degrees" };
    check(await answer([user, message, result], { tools: [tool] }), "there is no answer");
  },
  async form() {
    const json_schema = { name: "place", schema, strict: true };
    checkCity((await answer([user], { response_format: { type: "json_schema", json_schema } })).content);
  },
  async error() {
    try {
      await ask([user], { model: "nothing" });
    } catch (error) {
      check(error.status === 404 && /there is no model/.test(error.message), `${error}`);
      check(error.requestID ?? error.headers?.get("x-request-id"), "the error has no request id");
      return;
    }
    throw new Error("no error is raised");
  },
};

const found = {};
for (const [name, work] of Object.entries(cases)) {
  try {
    await work();
    found[name] = "ok";
  } catch (error) {
    found[name] = `${error}`;
  }
}
globalThis.found = found;
console.log(`| openai (JavaScript) | ${Object.values(found).join(" | ")} |`);
if (globalThis.process) process.exitCode = Object.values(found).every((one) => one === "ok") ? 0 : 1;
